# The proxy as an image: deploy/README.md says how to build and run it.
#
# The base is a minor version and no digest: a build gets the fixes of Python and Debian that there are, and with a
# digest somebody would have to renew it for each of them. For a build on the very same base, name one.

# PYTHON is the tag of the base image, with a digest if you like: 3.13-slim@sha256:...
ARG PYTHON=3.13-slim

FROM python:${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip wheel --no-deps --wheel-dir /wheels .
# Bytecode that is not compared with its source: copying into the next stage may change the files' times, and the proxy
# could not write it anew. The environment gets no pip of its own.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/trioproxy \
    && python -m pip --python /opt/trioproxy install --no-compile /wheels/*.whl \
    && /opt/trioproxy/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/trioproxy/lib


FROM python:${PYTHON}
ARG REVISION=""
LABEL org.opencontainers.image.title="trioproxy" \
      org.opencontainers.image.description="An OpenAI-API proxy that shares scarce model capacity by priority" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="docker.io/library/python:3.13-slim"
# Nothing but logs/ is the proxy's own. Where the root file system is read-only, mount something there or write no file.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /srv/trioproxy --shell /usr/sbin/nologin trioproxy \
    && install --directory --owner=trioproxy --group=trioproxy /srv/trioproxy/logs \
    && rm -r "$(python -c 'import ensurepip; print(*ensurepip.__path__)')" \
    && python -m pip uninstall --yes --quiet --root-user-action=ignore pip
COPY --from=build /opt/trioproxy /opt/trioproxy
ENV PATH=/opt/trioproxy/bin:${PATH}
# The base image has no bytecode of the standard library, and each start would compile it anew. This leaves that of the
# modules which are used, and shows that the program can be loaded.
RUN trioproxy --version

# Environment wins over the configuration file: the proxy listens here whatever that says, and at this machine's ports
# as `docker run --publish` says.
ENV TRIOPROXY_SERVER__BIND=0.0.0.0:8080 \
    TRIOPROXY_LOGGING__FORMAT=json \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /srv/trioproxy
USER 10001:10001
EXPOSE 8080
# Liveness. Not /ready: an upstream that is out is no reason to call the proxy ill.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-I", "-c", "import http.client, os; c = http.client.HTTPConnection(os.environ['TRIOPROXY_SERVER__BIND'].split(',')[0], timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["trioproxy"]
CMD ["serve"]
