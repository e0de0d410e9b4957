"""How a run goes: the plan, the workers, the driver."""
