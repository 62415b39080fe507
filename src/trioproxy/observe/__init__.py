"""One listener for each place where events are shown: metrics, logs."""
