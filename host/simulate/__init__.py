"""A fleet of simulated boards: they speak the MQTT contract as agents do, and load no model."""
