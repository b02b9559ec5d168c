"""Who is where: the SQL registry of nodes and clients."""
