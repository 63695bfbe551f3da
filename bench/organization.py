"""What it costs to list an organization's images with signed requests: 20 of 200 of them, and of very many."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from urllib.parse import quote

from bench.children import Answer, Child
from bench.figures import Figure, Result, Spread, differences, unmeasured
from bench.organization_rows import Owner, add_owner
from bench.pacing import rounds
from bench.place import running_stack
from bench.postgres import postgres_programs, running_postgres
from cli.home import open_catalog, secret_key
from cli.local_stack import API, LocalStack
from kiln.sealing import Sealer

FEW, MANY = 200, 100_000
SIGNED_GOAL_MS = 3.0
READ_GOAL_MS = 20.0
MS = 1000
PAGE_SIZES = (20, 100)
# Texts, and how many of the names hold them (organization_rows.py).
SEARCHES = {"zoo": "in none", "cathedral": "in 20", "%": "in 100", "tunnel": "in 1,000", "render": "in half of them"}


@dataclass(frozen=True)
class Read:
    """A page of the images whose names hold `q`, of all by default; `title` says what is special about it."""

    title: str
    page: int = 1
    per_page: int = 20
    q: str = ""

    @property
    def query(self) -> str:
        search = f"&q={quote(self.q)}" if self.q else ""
        return f"page={self.page}&per_page={self.per_page}{search}"


@dataclass(frozen=True)
class Load:
    """So many pairs of requests a run, a signed one and a bare one each, and how many runs at most."""

    pairs: int
    rounds: int
    seconds: float


@dataclass
class Series:
    """A read's runs: the median latencies, in ms, of its requests and of the bare ones beside them."""

    read: Read
    signed: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)

    def add(self, answer: Answer) -> None:
        self.signed.append(median(answer["signed"]) * MS)
        self.bare.append(median(answer["bare"]) * MS)

    @property
    def slower(self) -> Spread:
        return differences(self.signed, self.bare)


FEW_LOAD = Load(pairs=60, rounds=15, seconds=45.0)
MANY_LOAD = Load(pairs=20, rounds=5, seconds=60.0)


def measure() -> Result:
    """The same on both databases, each behind an API of its own. Raises MeasurementError."""
    programs = postgres_programs()
    on_sqlite = _measure_on("SQLite")
    if programs is None:
        why = "PostgreSQL is not installed (apt-get install postgresql)"
        return _joined(on_sqlite, unmeasured(_names("PostgreSQL"), why))
    with running_postgres(programs) as url:
        return _joined(on_sqlite, _measure_on("PostgreSQL", catalog_url=url))


def _joined(*results: Result) -> Result:
    return Result([each for one in results for each in one.figures], [each for one in results for each in one.notes])


def _measure_on(database: str, **settings: str) -> Result:
    with running_stack(parts=(API,), **settings) as stack:
        few, many = _owners(stack)
        (signed,) = _run(stack, few, [Read("20 of few")], FEW_LOAD)
        series = _run(stack, many, _reads(), MANY_LOAD)
    pages, searches = [each for each in series if not each.read.q], [each for each in series if each.read.q]
    names = _names(database)
    figures = [_signed(names[0], signed), _slowest(names[1], pages), _slowest(names[2], searches)]
    return Result(figures, [f"Reads of {MANY:,} images on {database} (medians):", *map(_note, series)])


def _owners(stack: LocalStack) -> tuple[Owner, Owner]:
    """An organization with few images, and one with many."""
    sealer = Sealer(secret_key(stack.settings))
    with open_catalog(stack.settings) as catalog:
        few, many = (add_owner(catalog, sealer, f"bench-{count}", count) for count in (FEW, MANY))
    return few, many


def _reads() -> list[Read]:
    """Pages where a database has least and most to skip, and searches that find little and much."""
    reads: list[Read] = []
    for size in PAGE_SIZES:
        last = MANY // size
        reads += [Read("first page", 1, size), Read("middle page", last // 2, size), Read("last page", last, size)]
        reads += [Read(f"{q!r}, {held}", 1, size, q) for q, held in SEARCHES.items()]
        reads += [Read("'render', middle page", last // 4, size, "render")]
    return reads


def _run(stack: LocalStack, owner: Owner, reads: Sequence[Read], load: Load) -> list[Series]:
    """All reads by turns."""
    series = [Series(read) for read in reads]
    expected = {q: owner.matching(q) for q in {read.q for read in reads}}
    setup = {"port": stack.settings.api_port, "key": owner.key, "secret": owner.secret}
    with Child("signer", setup) as signer:
        for read in reads:  # what is made or read at first use is now
            signer.ask("read", query=read.query, pairs=2, expected=expected[read.q])
        for _ in rounds(load.rounds, load.seconds):
            for each in series:
                query = each.read.query
                each.add(signer.ask("read", query=query, pairs=load.pairs, expected=expected[each.read.q]))
    return series


def _names(database: str) -> tuple[str, str, str]:
    return (
        f"a signed read of 20 of {FEW} images, {database}",
        f"the slowest page of {MANY:,} images, {database}",
        f"the slowest search in {MANY:,} images, {database}",
    )


def _signed(name: str, series: Series) -> Figure:
    return Figure(
        name=name,
        kiln=f"{median(series.signed):.2f} ms",
        reference=_reference(series),
        compared=_compared(series),
        goal=f"<= +{SIGNED_GOAL_MS:.0f} ms",
        met=series.slower.middle <= SIGNED_GOAL_MS,
        runs=f"{len(series.signed)} x {FEW_LOAD.pairs}",
    )


def _slowest(name: str, series: Sequence[Series]) -> Figure:
    slowest = max(series, key=lambda each: median(each.signed))
    milliseconds = median(slowest.signed)
    return Figure(
        name=name,
        kiln=f"{milliseconds:.1f} ms",
        reference=_reference(slowest),
        compared=_compared(slowest),
        goal=f"< {READ_GOAL_MS:.0f} ms",
        met=milliseconds < READ_GOAL_MS,
        runs=f"{len(slowest.signed)} x {MANY_LOAD.pairs}",
    )


def _reference(series: Series) -> str:
    return f"{median(series.bare):.2f} ms GET /healthz"


def _compared(series: Series) -> str:
    spread = series.slower
    return f"{spread.middle:+.2f} ms ({spread.low:+.2f} to {spread.high:+.2f})"


def _note(series: Series) -> str:
    read, spread = series.read, Spread.of(series.signed)
    quartiles = f"({spread.low:.1f} to {spread.high:.1f})"
    return f"  {read.title}, {read.per_page} a page: {spread.middle:.1f} ms {quartiles}"
