"""A whole reproduction by stages: what each needs, what it must have left, the record of that."""
