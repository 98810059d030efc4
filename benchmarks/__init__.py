"""Side-by-side measurements; ``python -m benchmarks`` runs them (see docs/performance.md)."""
