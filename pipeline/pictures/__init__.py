"""Pictures of samples: contact sheets, and images of any number of channels as RGB."""
