"""How long the phases of steps take."""

from __future__ import annotations

from time import perf_counter

from scheduler.messages import ProfileSteps, SchedulerOutput, StepPhase, StepProfile


class StepClock:
    """Adds up the time of each phase and, while a profile is wanted, notes each one.

    Attributes:
        seconds: by phase, of all steps so far.
    """

    def __init__(self) -> None:
        self.seconds = {"schedule": 0.0, "execute": 0.0, "update": 0.0}
        self._since = 0.0
        self._wanted: ProfileSteps | None = None
        self._phases: list[StepPhase] = []
        self._num_steps = 0
        self._profile: StepProfile | None = None

    def start(self) -> None:
        self._since = perf_counter()

    def lap(self, phase: str, step: SchedulerOutput | None) -> None:
        """The phase that began at the last ``start`` or ``lap`` ends now; it was about ``step``."""
        now = perf_counter()
        self.seconds[phase] += now - self._since
        if self._wanted is not None and step is not None:
            self._phases.append(
                StepPhase(
                    step.step_id, phase, self._since, now - self._since, step.num_tokens, len(step.scheduled)
                )
            )
            self._num_steps += phase == "update"
            if self._num_steps == self._wanted.num_steps:
                self._complete(self._wanted)
        self._since = now

    def profile(self, wanted: ProfileSteps) -> None:
        """Notes the phases of the next steps; zero steps end the profile of that id with what there is.

        Another profile takes the place of one that is not complete.
        """
        if wanted.num_steps:
            self._wanted, self._profile, self._num_steps = wanted, None, 0
            self._phases = []
        elif self._wanted is not None and self._wanted.profile_id == wanted.profile_id:
            self._complete(wanted)

    def _complete(self, wanted: ProfileSteps) -> None:
        self._profile = StepProfile(wanted.profile_id, tuple(self._phases))
        self._wanted, self._phases = None, []

    @property
    def has_profile(self) -> bool:
        """Whether a profile is complete and not taken."""
        return self._profile is not None

    def take_profile(self) -> StepProfile | None:
        profile, self._profile = self._profile, None
        return profile
