"""Frameworks that kvmmap plugs into, one package each; the only importers of them. `import kvmmap` loads none."""
