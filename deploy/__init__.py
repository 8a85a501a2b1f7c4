"""Setting things up: a local chain, a deployment, throwaway keys, the demo."""
