#!/bin/sh
# Prints a fresh .env for docker compose, every secret random: sh examples/deploy/secrets.sh > .env
set -eu
umask 077
secret() { head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }
cat <<ENV
# What runs beside the services that always do: gpu or cpu, and monitoring.
COMPOSE_PROFILES=${COMPOSE_PROFILES:-gpu}
# Folder and name of the fleet file; \`recovery validate FILE\` checks it.
FLEET_DIR=${FLEET_DIR:-./examples/deploy}
FLEET_FILE=${FLEET_FILE:-fleet.json}

# Only letters and digits: they stand in URLs.
REDIS_PASSWORD=$(secret)
FMCP_BEARER_TOKEN=$(secret)
METRICS_TOKEN=$(secret)
FLOWER_PASSWORD=$(secret)
GRAFANA_PASSWORD=$(secret)
ENV
