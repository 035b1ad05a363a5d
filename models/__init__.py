"""The catalog of known models, and the models small enough to come along. Data only: edgellm.catalog reads it."""
