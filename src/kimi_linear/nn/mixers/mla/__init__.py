"""Multi-head latent attention, without positions unless asked. See README.md here."""
