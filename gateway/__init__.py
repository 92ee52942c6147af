"""The gateway daemon: verifies, stores, aggregates and acknowledges what devices send; opens no frame and no model."""
