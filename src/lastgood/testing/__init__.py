"""For people who write storage backends: what a backend is tested with. Needs pytest; nothing else here imports it."""
