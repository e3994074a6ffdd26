"""Claims: the checks that the whole book rests on, each with a stated rate of false alarms and of misses.

A notebook calls one of three verbs, which show a row and then raise :class:`ClaimError` if the claim failed:

- :func:`agree`: a simulation agrees with a formula, and the formula with its derivation;
- :func:`exact`: two computations of one number agree;
- :func:`bounded`: an inequality holds, and the check is able to notice when it does not.

``check_agree``, ``check_exact`` and ``check_bounded`` do the same without showing or raising. The idea of stating both
error rates is that of TensorFlow Probability's ``statistical_testing``.
"""

import html
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from numbers import Integral, Real
from typing import Any

import numpy as np
import sympy as sp
import torch
from IPython.display import display
from scipy import special, stats

from helpers.lab.estimates import Estimate, Proportion, stack
from helpers.lab.registry import REGISTRY, miscounted, read_chapter
from helpers.lab.tables import Html, Table

FALSE_ALARM = 1e-6  # probability that a right formula fails, for a whole claim
MISS = 1e-3  # probability that a formula wrong by `resolution` passes
COPY = 1e-14  # relative difference below which a simulation is a copy of its formula
ROUNDING = 1e-9  # relative difference that two computations of one number may have
MAX_LOG_TAIL_ERROR = math.log(2)  # skewness may change a tail probability by no more than a factor of two
ID_PATTERN = re.compile(r"[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*")
GO_ON = "BOOK_GO_ON"  # environment variable that `make reseed` sets: a failed claim is shown, and not raised

Numbers = float | np.ndarray | torch.Tensor
Settings = Sequence[Mapping[str, Real]]


class ClaimError(AssertionError):
    """A claim of the book does not hold, or the evidence for it is too weak."""


@dataclass(frozen=True)
class Claim:
    """The outcome of a check.

    Parameters
    ----------
    id, case : str
        ``chapter.slug``, and which of several checks of that claim this is.
    kind : {"agree", "exact", "bounded"}
    row, sentence : str
        The outcome in figures, and in words.
    figures : dict
        What the ledger shows: plain numbers and lists, and under ``shown`` which entry the row shows.
    problems : list of str
        Why the claim failed; empty if it passed.
    """

    id: str
    case: str
    kind: str
    row: str
    sentence: str
    figures: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the claim holds, on sufficient evidence."""
        return not self.problems

    @property
    def name(self) -> str:
        """The id, with the case in brackets."""
        return f"{self.id} [{self.case}]" if self.case else self.id

    def __repr__(self) -> str:
        return "\n".join([f"{self.name}  {self.row}", *(f"  FAILED: {problem}" for problem in self.problems)])

    def _repr_html_(self) -> str:
        state, mark = ("passed", "✓") if self.passed else ("failed", "✗")
        words = self.sentence if self.passed else "This claim failed: " + "; ".join(self.problems) + "."
        return (
            f'<details class="claim claim-{state}"><summary><span aria-hidden="true">{mark}</span> '
            f"{html.escape(words)} <small>{html.escape(self.name.partition('.')[2])}</small></summary>"
            f"<code>{html.escape(self.row)}</code></details>"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        data = {"text/plain": repr(self), "text/html": self._repr_html_()}
        names = ("id", "case", "kind", "passed", "row", "problems")
        return data, {"claim": {name: getattr(self, name) for name in names} | self.figures}


def agree(
    id: str,
    simulated: Estimate | Sequence[Estimate],
    *,
    formula: Callable[..., Any] | Numbers | Estimate,
    derived: sp.Expr | None = None,
    at: Settings | None = None,
    case: str = "",
    resolution: float = 0.05,
    scale: Numbers | None = None,
) -> None:
    """Claim that a simulation agrees with a formula, and the formula with its derivation.

    Parameters
    ----------
    id : str
        ``chapter.slug``.
    simulated : Estimate or sequence of Estimate
        A sequence holds one estimate per setting.
    formula : callable, array_like or Estimate
        The closed form. A callable is called with each setting of `at` as keywords. An Estimate must come from other
        data than `simulated`.
    derived : sympy.Expr, optional
        What the derivation gives; its symbols carry the names of the parameters in `at`. Must equal `formula` to 1e-9.
    at : sequence of mappings, optional
        Settings of the parameters: at least three, none of whose values is 0, ±1 or equal to another.
    case : str
        Which check of the claim this is, if there are several.
    resolution : float
        The smallest error, as a fraction of `scale`, that must be caught with probability 0.999.
    scale : array_like, optional
        Defaults to ``|formula|``, for proportions ``min(p, 1-p)``, for covariances ``sqrt(C_ii C_jj)``.

    Raises
    ------
    ClaimError
        After showing the row: if simulation and formula differ by more than c standard errors, with
        ``c = Φ⁻¹(1 - 1e-6 / 2k)`` for k entries, so that a right formula fails once in a million; if
        ``resolution · scale < (c + 3.09) · stderr``, so that a wrong one might pass; if the samples are so skewed that
        the normal approximation of that tail is off by more than a factor of two, ``|γ| c³ / (3 √n) > ln 2``; if
        `derived` differs from `formula`; or if the simulation equals the formula to the last digit, in every entry that
        is not 0. (The mean of whole numbers can hit a formula by chance: state it as a proportion.)
    ValueError
        If a figure is NaN or infinite, a standard error 0, a shape wrong, the scale 0, or the settings not generic.
    """
    _show(
        check_agree(
            id,
            simulated,
            formula=formula,
            derived=derived,
            at=at,
            case=case,
            resolution=resolution,
            scale=scale,
        )
    )


def exact(
    id: str,
    formula: Numbers,
    computed: Numbers,
    *,
    rtol: float = ROUNDING,
    scale: Numbers | None = None,
    case: str = "",
) -> None:
    """Claim that two computations of one number (or array) agree.

    Parameters
    ----------
    id, case : str
        As in :func:`agree`.
    formula, computed : array_like
        The closed form, and the same by enumeration, quadrature or a library's routine.
    rtol : float
        Allowed difference as a fraction of `scale`, below 1; at 0 the numbers must be identical.
    scale : array_like, optional
        Defaults to ``|formula|``.

    Raises
    ------
    ClaimError
        After showing the row, if they differ.
    ValueError
        If a figure is NaN or infinite, shapes differ, the scale is 0 or `rtol` lies outside [0, 1).
    """
    _show(check_exact(id, formula, computed, rtol=rtol, scale=scale, case=case))


def bounded(
    id: str,
    observed: Numbers | Estimate,
    *,
    bound: Numbers,
    attained: tuple[Numbers | Estimate, Numbers] | None = None,
    control: tuple[Numbers | Estimate, Numbers] | None = None,
    case: str = "",
) -> None:
    """Claim that ``observed <= bound``, by a check that is shown to be able to fail.

    Parameters
    ----------
    id, case : str
        As in :func:`agree`.
    observed : array_like or Estimate
        A number satisfies the bound to rounding. An Estimate violates it only if its one-sided limit at level
        1 - 1e-6 lies above the bound; for a Proportion this is the Clopper–Pearson limit, so 0 of n is fine.
    bound : array_like
        Upper bound, of the shape of `observed` or a scalar.
    attained : (observed, bound), optional
        A case in which the two are equal: numbers to 1e-9, an Estimate as in :func:`agree`.
    control : (observed, bound), optional
        A wrong constant or a violated premise, which the same check must reject.

    Raises
    ------
    ClaimError
        After showing the row: if the bound is violated, not attained, or the control not rejected.
    ValueError
        If neither `attained` nor `control` is given, a figure is NaN or infinite, or shapes differ.
    """
    _show(check_bounded(id, observed, bound=bound, attained=attained, control=control, case=case))


def check_agree(
    id: str,
    simulated: Estimate | Sequence[Estimate],
    *,
    formula: Callable[..., Any] | Numbers | Estimate,
    derived: sp.Expr | None = None,
    at: Settings | None = None,
    case: str = "",
    resolution: float = 0.05,
    scale: Numbers | None = None,
    false_alarm: float = FALSE_ALARM,
    miss: float = MISS,
) -> Claim:
    """Return what :func:`agree` would show; `false_alarm` and `miss` set its two error rates."""
    _require_id(id)
    if at is not None:
        _require_generic(at)
    if not isinstance(simulated, Estimate):
        simulated = stack(simulated)
    theory, asymmetry, stderr = _theory(formula, at, simulated)
    scale = simulated.natural_scale(theory) if scale is None else scale
    scale = _require_scale(scale, theory.shape)
    if (stderr <= 0).any():
        raise ValueError(f"a standard error must be positive, got {stderr.min():g}")

    critical = _upper_quantile(false_alarm / (2 * theory.size))
    error = simulated.value - theory
    z = error / stderr
    catches = (critical + _upper_quantile(miss)) * stderr / scale
    skew = np.abs(asymmetry) * critical**3 / 3

    worst = np.unravel_index(np.abs(z).argmax(), z.shape)
    where = _where(worst, at)
    derivation = None if derived is None else _derivation(derived, at, theory.shape)
    problems = []
    if derivation is not None and (np.abs(derivation - theory) > ROUNDING * np.abs(theory)).any():
        off = np.unravel_index(np.abs(derivation - theory).argmax(), theory.shape)
        problems.append(f"derived {derivation[off]:.10g} is not the formula's {theory[off]:.10g}{_where(off, at)}")
    if not np.all(catches <= resolution * (1 + ROUNDING)):
        problems.append(f"too noisy: would catch {percent(catches.max())}, wanted {percent(resolution)}")
    if (skew > MAX_LOG_TAIL_ERROR).any():
        problems.append(f"too skewed for its sample: |γ|c³/(3√n) = {skew.max():.2g} must not exceed ln 2 = 0.69")
    if _copied(simulated, theory):
        problems.append("the simulation equals the formula to the last digit: it was not simulated")
    if not np.all(np.abs(z) <= critical):
        problems.append(f"simulation and formula differ{where} by {abs(z[worst]):.1f} standard errors")

    equals = f"{derivation[worst]:.5g} = " if derivation is not None else ""
    row = (
        f"{_entries(z, where)}{equals}{theory[worst]:.5g} ≈ {simulated.value[worst]:.5g} ± {stderr[worst]:.2g}  "
        f"z {z[worst]:+.2f}  would catch {percent(catches.max())}"
    )
    sentence = (
        f"The simulation agrees with the formula{' and its derivation' if derived is not None else ''}: "
        f"off by {percent(np.max(np.abs(error) / scale))}{' at most' if z.size > 1 else ''}; "
        f"an error of {percent(catches.max())} would have been noticed."
    )
    figures = {
        "derived": None if derivation is None else _plain(derivation),
        "formula": _plain(theory),
        "simulated": _plain(simulated.value),
        "stderr": _plain(stderr),
        "z": _plain(z),
        "would_catch": _plain(catches.max()),
        "shown": int(np.abs(z).argmax()),
    }
    return Claim(id, case, "agree", row, sentence, figures, problems)


def check_exact(
    id: str,
    formula: Numbers,
    computed: Numbers,
    *,
    rtol: float = ROUNDING,
    scale: Numbers | None = None,
    case: str = "",
) -> Claim:
    """Return what :func:`exact` would show."""
    _require_id(id)
    if not 0 <= rtol < 1:
        raise ValueError(f"rtol must lie in [0, 1), got {rtol}")
    formula, computed = _finite("formula", formula), _finite("computed", computed)
    _require_shape("computed", computed.shape, formula.shape)
    scale = _require_scale(np.abs(formula) if scale is None else scale, formula.shape)
    relative = np.abs(formula - computed) / scale
    passed = bool((relative <= rtol).all())
    # Among entries that are equal to rounding, which one is worst differs from one processor to the next.
    at = 0 if passed else int(relative.argmax())
    shown = np.unravel_index(at, relative.shape)
    where = "" if passed else _where(shown, None)
    signs = ("=", "equal") if passed else ("≠", "not equal")
    tolerance = f" to {rtol:.0e}" if rtol else ""
    row = f"{_entries(relative, where)}{formula[shown]:.5g} {signs[0]} {computed[shown]:.5g}  {signs[1]}{tolerance}"
    problems = [] if passed else [f"two computations{where} differ by {percent(relative.max())}"]
    precision = f"to {-math.log10(rtol):.0f} digits" if rtol else "to the last bit"
    sentence = f"Two independent computations agree, {precision}."
    figures = {"formula": _plain(formula), "computed": _plain(computed), "rtol": rtol, "shown": at}
    return Claim(id, case, "exact", row, sentence, figures, problems)


def check_bounded(
    id: str,
    observed: Numbers | Estimate,
    *,
    bound: Numbers,
    attained: tuple[Numbers | Estimate, Numbers] | None = None,
    control: tuple[Numbers | Estimate, Numbers] | None = None,
    case: str = "",
    false_alarm: float = FALSE_ALARM,
) -> Claim:
    """Return what :func:`bounded` would show; `false_alarm` sets the level of its one-sided limits."""
    _require_id(id)
    if attained is None and control is None:
        raise ValueError("a bound needs a case that attains it or a control that breaks it, got neither")
    observed, bound = _observed_and_bound(observed, bound)
    value = observed.value if isinstance(observed, Estimate) else observed
    excess = _lower_limit(observed, false_alarm) - bound
    # The tightest entry is that of the smallest relative slack, which bounds of 0 or below do not have.
    closeness = value / bound if (bound > 0).all() else value - bound
    tightest = np.unravel_index(closeness.argmax(), value.shape)
    problems = []
    if not _below(observed, bound, false_alarm):
        problems.append(f"the bound is exceeded by {excess.max():.3g}")

    row = f"{_entries(value, _where(tightest, None))}{_observation(observed, tightest)} ≤ {bound[tightest]:.5g}"
    sentence = "The bound holds"
    slack = None
    if bound[tightest] > 0:
        slack = 1 - value[tightest] / bound[tightest]
        row += f"  slack {percent(slack)}"
        sentence += f" with {percent(slack)} to spare" if slack > ROUNDING else " with nothing to spare"
    if attained is not None:
        sentence += ", and a case attains it"
        if _attains(id, *attained):
            row += "  attained"
        else:
            problems.append("the case that should attain the bound does not")
    if control is not None:
        sentence += ", and the control breaks it, as it must"
        if not _below(*_observed_and_bound(*control), false_alarm):
            row += "  control rejected"
        else:
            problems.append("the control, which should break the bound, does not")
    figures = {
        "observed": _plain(value),
        "seen": _observation(observed, tightest),
        "bound": _plain(bound),
        "slack": None if slack is None else _plain(slack),
        "shown": int(closeness.argmax()),
    }
    return Claim(id, case, "bounded", row, sentence + ".", figures, problems)


class ChapterTable(Table):
    """The claims of one chapter as its last page shows them: title, source, and how often each was checked.

    Parameters
    ----------
    chapter : str
        Name of the chapter, the part of a claim's id before the dot.
    registry : path
        The folder of the chapters' files.

    Raises
    ------
    ClaimError
        If a claim was checked in this notebook more or less often than it is registered.
    ValueError
        If the chapter is not registered.
    """

    def __init__(self, chapter: str, registry: Traversable = REGISTRY) -> None:
        claims = read_chapter(chapter, registry).claims
        checked = [claim.id for claim in _shown.values() if claim.id.startswith(f"{chapter}.")]
        problems = miscounted(claims, checked)
        if problems:
            raise ClaimError("; ".join(problems))
        rows = [[_link(claim.id), claim.title, claim.source, str(claim.checks)] for claim in claims]
        super().__init__(["Claim", "What it says", "Source", "Checks"], rows)


def _link(id: str) -> Html:
    return Html(f'<a href="#{id}"><code>{id.partition(".")[2]}</code></a>', id)


# Every claim shown in this process by (id, case): running a cell again replaces its claim.
_shown: dict[tuple[str, str], Claim] = {}


def _show(claim: Claim) -> None:
    _shown[claim.id, claim.case] = claim
    display(claim)
    if not claim.passed and GO_ON not in os.environ:
        raise ClaimError(f"{claim.name}: {'; '.join(claim.problems)}")


def _require_id(id: str) -> None:
    if not ID_PATTERN.fullmatch(id):
        raise ValueError(f"a claim's id must have the form chapter.slug in lower case, got {id!r}")


def _require_generic(at: Settings) -> None:
    """Refuse settings at which a wrong formula could agree by coincidence."""
    if len(at) < 3:
        raise ValueError(f"a claim needs at least 3 settings, got {len(at)}")
    if any(setting.keys() != at[0].keys() for setting in at):
        raise ValueError("all settings must name the same parameters, got " + ", ".join(str(set(s)) for s in at))
    for setting in at:
        values = [abs(value) for value in setting.values()]
        if {0, 1} & set(values) or len(set(values)) < len(values):
            raise ValueError(f"no parameter may be 0, ±1 or equal another in size, got {dict(setting)}")
    for name in at[0]:
        if len({setting[name] for setting in at}) < 3:
            raise ValueError(f"every parameter must take at least 3 values, got {name} = {at[0][name]}, …")


def _theory(
    formula: Callable[..., Any] | Numbers | Estimate, at: Settings | None, simulated: Estimate
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the formula's values, and asymmetry and standard error of their difference from the simulation."""
    if isinstance(formula, Estimate):
        _require_shape("formula", formula.value.shape, simulated.value.shape)
        stderr = np.hypot(simulated.stderr, formula.stderr)
        third = simulated.asymmetry * simulated.stderr**3 - formula.asymmetry * formula.stderr**3
        return formula.value, np.divide(third, stderr**3, out=np.zeros_like(stderr), where=stderr > 0), stderr
    if callable(formula):
        if at is None:
            raise ValueError("a formula that is a function needs its settings in `at`, got none")
        formula = np.stack([_finite("formula", formula(**setting)) for setting in at])
    theory = _finite("formula", formula)
    if at is not None:
        _require_shape("formula", theory.shape[:1], (len(at),))
    _require_shape("formula", theory.shape, simulated.value.shape)
    return theory, simulated.asymmetry, simulated.stderr


def _copied(simulated: Estimate, theory: np.ndarray) -> bool:
    """Whether a simulation equals a formula in every entry that is not 0, to rounding, as only a copy does.

    A mean of real numbers does so with probability 0. A relative frequency k/n does with probability 1/√(2πnp(1-p)),
    and is a copy only if that is below the rate of false alarms for all entries together.
    """
    told = theory != 0  # a mean of whole numbers can well be 0
    if not told.any() or (np.abs(simulated.value - theory) > COPY * np.abs(theory))[told].any():
        return False
    if not isinstance(simulated, Proportion):
        return True
    return bool(np.prod(1 / (math.sqrt(2 * math.pi) * simulated.n * simulated.stderr)) < FALSE_ALARM)


def _derivation(derived: sp.Expr, at: Settings | None, shape: tuple[int, ...]) -> np.ndarray:
    values = np.array([_evaluate(derived, setting) for setting in at] if at else _evaluate(derived, {}))
    _require_shape("derived", values.shape, shape)
    return values


def _evaluate(derived: sp.Expr, setting: Mapping[str, Real]) -> float:
    """Substitute a setting into an expression by the names of its symbols, with 30 digits against cancellation."""
    missing = {symbol.name for symbol in derived.free_symbols} - setting.keys()
    if missing:
        raise ValueError(f"every symbol of `derived` must be a parameter in `at`, got {sorted(missing)} besides")
    values = {
        symbol: sp.Integer(int(value)) if isinstance(value, Integral) else sp.Float(value, 30)
        for symbol in derived.free_symbols
        for value in [setting[symbol.name]]
    }
    value = sp.N(derived.subs(values).doit(), 30)
    if not (value.is_real and value.is_finite):
        raise ValueError(f"derived must be finite and real, got {value} at {dict(setting)}")
    return float(value)


def _observed_and_bound(observed: Numbers | Estimate, bound: Numbers) -> tuple[np.ndarray | Estimate, np.ndarray]:
    if not isinstance(observed, Estimate):
        observed = _finite("observed", observed)
    shape = observed.value.shape if isinstance(observed, Estimate) else observed.shape
    bound = _finite("bound", bound)
    if bound.ndim:
        _require_shape("bound", bound.shape, shape)
    return observed, np.broadcast_to(bound, shape)


def _lower_limit(observed: np.ndarray | Estimate, false_alarm: float) -> np.ndarray:
    """Return one-sided lower confidence limits at level 1 - false_alarm for all entries together."""
    if not isinstance(observed, Estimate):
        return observed
    level = false_alarm / observed.value.size
    if isinstance(observed, Proportion):
        k, n = observed.successes, observed.n
        return np.where(k > 0, stats.beta.ppf(level, np.maximum(k, 1), n - k + 1), 0.0)
    return observed.value - _upper_quantile(level) * observed.stderr


def _upper_quantile(probability: float) -> float:
    """Return the point that a standard normal variable exceeds with this probability."""
    return -float(special.ndtri(probability))


def _below(observed: np.ndarray | Estimate, bound: np.ndarray, false_alarm: float) -> bool:
    return bool(np.all(_lower_limit(observed, false_alarm) <= bound + ROUNDING * np.abs(bound)))


def _attains(id: str, observed: Numbers | Estimate, bound: Numbers) -> bool:
    observed, bound = _observed_and_bound(observed, bound)
    if isinstance(observed, Estimate):
        return check_agree(id, observed, formula=bound).passed
    return bool(np.all(np.abs(observed - bound) <= ROUNDING * np.abs(bound)))


def _finite(name: str, numbers: Any) -> np.ndarray:
    if isinstance(numbers, torch.Tensor):
        numbers = numbers.detach().cpu()
    numbers = np.asarray(numbers, dtype=np.float64)
    if numbers.size == 0 or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite and not empty, got {numbers}")
    return numbers


def _require_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(f"{name} must have shape {wanted}, got {shape}")


def _require_scale(scale: Numbers, shape: tuple[int, ...]) -> np.ndarray:
    scale = _finite("scale", scale)
    if scale.ndim:
        _require_shape("scale", scale.shape, shape)
    if (scale <= 0).any():
        raise ValueError(f"scale must be positive; where theory gives 0 it has to be named, got {scale.min():g}")
    return scale if scale.shape == shape else np.broadcast_to(scale, shape)


def _where(index: tuple[int, ...], at: Settings | None) -> str:
    if not index:
        return ""
    if at is not None:
        setting = ", ".join(f"{name}={value:g}" for name, value in at[index[0]].items())
        index = index[1:]
        return f" at {setting}" + (f", entry {tuple(map(int, index))}" if index else "")
    return f" at entry {', '.join(map(str, index))}"


def _entries(values: np.ndarray, where: str) -> str:
    if values.ndim == 0:
        return ""
    return f"{values.size} values, {'worst' + where if where else 'the first'}: "


def _observation(observed: np.ndarray | Estimate, index: tuple[int, ...]) -> str:
    if isinstance(observed, Proportion):
        return f"{observed.successes[index]:.0f} of {observed.n[index]:.0f}"
    if isinstance(observed, Estimate):
        return f"{observed.value[index]:.5g} ± {observed.stderr[index]:.2g}"
    return f"{observed[index]:.5g}"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage to two digits."""
    value = 100 * fraction
    return f"{value:.0f} %" if abs(value) >= 99.5 else f"{value:.2g} %"


def _plain(numbers: np.ndarray) -> float | list:
    """Return figures as JSON holds them, in full, so that the ledger rounds them as the row does."""
    return np.asarray(numbers).tolist()
