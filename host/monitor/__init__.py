"""The monitor: broker, ingest, store, web page and metrics. Reads the MQTT contract only; never loads a model."""
