# docker build -t waltrail .
# docker run -v /data:/data --user "$(stat -c %u:%g /data)" -e AWS_ACCESS_KEY_ID -e AWS_SECRET_ACCESS_KEY -e AWS_REGION \
#   waltrail replicate /data/app.db s3://bucket/app

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
# A C compiler, for the SQLite and zstd that are built in. Nothing else is needed: TLS is rustls.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY Cargo.toml Cargo.lock ./
COPY src src
# Declared in Cargo.toml, so it has to be there; it is not built.
COPY benches benches
RUN cargo build --release --locked

FROM debian:bookworm-slim
# Certificates, so that storage can be trusted.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --no-create-home waltrail
COPY --from=build /src/target/release/waltrail /usr/local/bin/waltrail
# Where health and metrics are served, in the container alone, unless `[http] listen` or --listen says otherwise; then the health check
# needs the same address here. `-e WALTRAIL_LISTEN=[::]:9180` serves them to others as well.
ENV WALTRAIL_LISTEN=127.0.0.1:9180
HEALTHCHECK --interval=30s --timeout=6s --start-period=60s CMD ["waltrail", "health"]
# The user must be able to write to the database and its directory: run with --user to match the application's.
USER waltrail
# `replicate` ships what is left at SIGTERM; Docker gives it 10 seconds, it takes 8 at most.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/waltrail"]
CMD ["--help"]
