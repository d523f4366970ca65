"""What an operator needs: keys, logs, metrics, the dial, and what the page shows."""
