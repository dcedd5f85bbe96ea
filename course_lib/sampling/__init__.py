"""From logits to token ids: masks, penalties, truncation and the random draw (floor 3)."""
