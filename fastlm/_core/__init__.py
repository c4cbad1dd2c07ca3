"""What every layer of the package stands on: the choice of a backend, dropout's generator, files."""
