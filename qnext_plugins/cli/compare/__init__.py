"""``qnext compare``: the same prompts to several servers; who agrees, who does not, and what is faster."""
