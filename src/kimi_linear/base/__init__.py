"""What every other layer may use: errors, configuration, names, environment, tolerances, files. No torch."""
