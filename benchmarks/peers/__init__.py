"""What is measured: one file a party. They need no part of rolora, except its own."""
