"""What the settings of training stages have to be, whatever is trained."""


def check_least(settings: object, least: int, *names: str) -> None:
    """ValueError, naming it, where one of these fields is below `least`."""
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"{name} is {getattr(settings, name)}: {least} or more is needed")


def check_rates(peak_lr: float, final_lr: float) -> None:
    """ValueError for learning rates that cannot be."""
    if peak_lr <= 0 or not 0 <= final_lr <= peak_lr:
        raise ValueError(f"peak_lr is {peak_lr}, final_lr {final_lr}: 0 <= final_lr <= peak_lr > 0 is needed")
