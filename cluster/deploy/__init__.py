"""Job submission, and manifests for Kubernetes and AWS."""
