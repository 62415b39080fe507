"""What shows and tests the proxy without an OpenAI key: a simulated upstream, simulated clients, and a live page."""
