# The risk service with its pages; amd64 and arm64: docker buildx build --platform linux/amd64,linux/arm64 -f deploy/compose/risk.Dockerfile .
# torch comes without CUDA here; for a GPU build with --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY deploy/constraints.txt deploy/constraints.txt
COPY edgepriv edgepriv
COPY gateway gateway
COPY firmware_sim firmware_sim
RUN python -m venv /opt/edgepriv \
 && /opt/edgepriv/bin/pip install --no-cache-dir -c deploy/constraints.txt --extra-index-url "${TORCH_INDEX}" '.[server]'

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --home-dir /var/lib/edgepriv-risk --create-home --shell /usr/sbin/nologin edgepriv
COPY --from=build /opt/edgepriv /opt/edgepriv
ENV PATH=/opt/edgepriv/bin:$PATH ORT_DISABLE_TELEMETRY=1 HOME=/var/lib/edgepriv-risk MPLCONFIGDIR=/tmp
USER 10001
VOLUME /var/lib/edgepriv-risk
EXPOSE 9465
HEALTHCHECK --start-period=120s --interval=30s --timeout=10s CMD \
  ["/opt/edgepriv/bin/python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9465/metrics', timeout=8)"]
ENTRYPOINT ["/opt/edgepriv/bin/edgepriv"]
CMD ["risk", "serve", "--config", "/etc/edgepriv/risk.toml"]
