"""Pure decisions: models, states, backoff, budget, diagnosis, remedies. Nothing here touches the world."""
