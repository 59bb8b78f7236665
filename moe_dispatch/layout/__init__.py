"""Who holds which token, head and expert: index arithmetic on whole grids. No float; no process group but in mesh."""
