"""What the Kafka adapter alone does, on a real server; the promises common to all brokers are in tests/conformance."""
