"""Other packages' call signatures on our operators, so that changing an import line is enough."""
