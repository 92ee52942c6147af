# Gateway and its pages; amd64 and arm64: docker buildx build --platform linux/amd64,linux/arm64 -f deploy/compose/gateway.Dockerfile .
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY deploy/constraints.txt deploy/constraints.txt
COPY edgepriv edgepriv
COPY gateway gateway
COPY firmware_sim firmware_sim
RUN python -m venv /opt/edgepriv \
 && /opt/edgepriv/bin/pip install --no-cache-dir -c deploy/constraints.txt '.[gateway,postgres]'

FROM python:3.11-slim-bookworm
# The folder of enrolment has a volume of its own, which takes its owner from here.
RUN useradd --system --uid 10001 --home-dir /var/lib/edgepriv-gateway --create-home --shell /usr/sbin/nologin edgepriv \
 && install -d -m 700 -o edgepriv /var/lib/edgepriv-gateway/enrolment
COPY --from=build /opt/edgepriv /opt/edgepriv
ENV PATH=/opt/edgepriv/bin:$PATH ORT_DISABLE_TELEMETRY=1
USER 10001
VOLUME /var/lib/edgepriv-gateway
EXPOSE 9464 8080
HEALTHCHECK --start-period=60s --interval=30s --timeout=5s CMD \
  ["/opt/edgepriv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9464/healthz', timeout=4)"]
ENTRYPOINT ["/opt/edgepriv/bin/edgepriv-gateway"]
CMD ["run", "--config", "/etc/edgepriv/gateway.toml"]
