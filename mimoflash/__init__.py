"""mimoflash."""
