"""What an installation on several machines needs beside the code: units, access rules for Redis, Flower behind a password."""
