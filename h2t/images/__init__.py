"""Images of a task: where they come from, how they are decoded, and how a backbone reads them."""
