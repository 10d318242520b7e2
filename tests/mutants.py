"""Changes to one line each, as somebody may get them wrong: does the short suite see them? `python tests/mutants.py`.

All mutants of C++ are in one binary. In a copy of the tree an expression that the table marks becomes

    (normkit_mutant(17) ? (new) : (old))

and NORMKIT_MUTANT=17 chooses the new one. So all of them take no more than two builds, one of the CPU's kernels and one
of the GPU's, which run on the CPU there; a mutant of Python has a copy of the package. For each mutant the suite runs
without `--full`, up to the first failure, and first of all the files that the table names, since what fails should do
so soon.

Needs what the tests and the build want, and an installed normkit, whose version tests read. What has been found is kept
in build/mutants/log.jsonl, and a second run goes on behind it; `--again` begins anew. Ends with status 1 where a mutant
survives.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/mutants"
COPIED = ("cpp", "cuda", "python", "tests/shim", "CMakeLists.txt")
# In a build of the kernels of a GPU: tests of their own, then tests of values on arrays that seem to be a GPU's.
OF_SHIM = "cuda_arrays gpu gpu_check gpu_table l2_normalize launches"
OF_VALUES = "values where residual activation adaptive phases layouts edges errors extremes double_backward"
HANGS = 1800  # seconds

CHOICE = """#pragma once
#include <cstdlib>
namespace {
const int normkit_chosen = std::getenv("NORMKIT_MUTANT") ? std::atoi(std::getenv("NORMKIT_MUTANT")) : 0;
[[maybe_unused]] constexpr bool normkit_mutant(int k) {
  return !__builtin_is_constant_evaluated() && normkit_chosen == k;
}
}  // namespace
"""


@dataclass(frozen=True)
class Mutant:
    file: str
    marked: str  # text that is in the file once, an expression in it marked: «old»
    new: str
    reason: str
    near: str  # tests that should notice

    @cached_property
    def parts(self) -> tuple[str, str, str]:
        before, old, after = re.split("[«»]", self.marked)
        return before, old, after

    @property
    def build(self) -> str:
        return "shim" if self.file.startswith("cuda/") or self.file == "python/normkit/_cuda.py" else "cpu"

    def place(self, text: str) -> tuple[int, int]:
        """Where in a file the expression is."""
        before, old, after = self.parts
        if (count := text.count(before + old + after)) != 1:
            raise SystemExit(f"{self.file} has {count} times, expected once: {before + old + after}")
        begin = text.index(before + old + after) + len(before)
        return begin, begin + len(old)


COMMON, RUNS, LANES = (f"cpp/src/kernels/{name}.hpp" for name in ("common", "runs", "lanes"))
RUNS_BACKWARD, LANES_BACKWARD = (f"cpp/src/kernels/{name}_backward.hpp" for name in ("runs", "lanes"))
FORMULA, ARGUMENTS, PLAN = "cpp/include/normkit/formula.hpp", "cpp/src/arguments.cpp", "cpp/src/plan.cpp"
DOUBLE, VIEWS = "cpp/src/kernels/double_backward.hpp", "cpp/src/views.cpp"

MUTANTS = [
    # ---- kernels of the CPU
    Mutant(COMMON, "if («i < n») f(Part{i, static_cast<int>(n - i)});\n}", "i + 1 < n",
           "a tail of one element is forgotten", "activation residual"),
    Mutant(COMMON, ": «(group + 1) * p.stride - here»;", "(group + 1) * p.stride - here + 1",
           "a piece reaches into the next one's parameter", "values"),
    Mutant(COMMON, "given_at(t.given, «statistic / t.given.stride» % t.given.count)", "statistic",
           "given statistics are counted without their stride", "values"),
    Mutant(COMMON, "return x + k * stride + i;\n    return «x»;", "x + rows * stride",
           "what follows an array is read for a column without members", "fences"),
    Mutant(COMMON, "members += «row[i] != 0»;", "row[i] == 0",
           "who is no member is counted", "where"),
    Mutant(COMMON, "(Bytes)(«here != Bytes{}»)", "here == Bytes{}",
           "of many bytes those are counted that are no members", "where"),
    Mutant(VIEWS, "line[k + kLines / 2], «false»);", "true",
           "turned squares have their second half twice", "views"),
    Mutant(COMMON, "p.data && «p.offset == 0» &&", "true",
           "weight_offset is lost where weights are read as they lie", "activation"),
    Mutant(COMMON, "if («first_ > 0») return put_part();", "false",
           "a line that others began is written as a whole", "streamed"),
    Mutant(RUNS, "f(step, «least(g.steps - step, c.rows)», std", "c.rows",
           "the last chunk goes on past the last step", "values"),
    Mutant(RUNS, "moments_of<double>(0, 0, «mul_add(m.mean * m.mean, count, m.m2)», count);", "m.m2",
           "the mean is taken out of what is not centered", "extremes values"),
    Mutant(RUNS, "kMomentDoubles<S> * (r * c.spans + «span»));", "c.spans - 1 - span",
           "spans merge in another order where threads share a statistic", "threads bits where"),
    Mutant(RUNS, ": «static_cast<ScalarOf<X>>(m.mean)»;", "first_pivot(x, stride, rows, n, members)",
           "each chunk has a pivot of its own: other bits than recorded", "golden bits"),
    Mutant(RUNS, "? sum(load(x)) * («ScalarOf<X>(1) / kWidth»)", "ScalarOf<X>(0)",
           "the pivot is 0: digits are lost far from zero, or time", "extremes golden"),
    Mutant(RUNS_BACKWARD, "return t.frozen ? «static_cast<double>(given.mean_low)» : sum_d / n;", "0.0",
           "the low digits of a given mean are dropped", "values extremes"),
    Mutant(RUNS_BACKWARD, "s.d = s.d + «members.keep(here, d)»;", "place.keep(d)",
           "who is no member moves the mean", "where"),
    Mutant(RUNS_BACKWARD, "const double weight = «t.phase == Phase::apply ? 1 : common_weight(t, o, lane)»;",
           "common_weight(t, o, lane)", "given sums are weighted twice", "phases"),
    Mutant(RUNS_BACKWARD, "d[0] = s.rstd * mul_add(«-shift», d[1], d[0]); });", "shift",
           "the gradient of a weight is moved the wrong way", "values"),
    Mutant(RUNS_BACKWARD, "const V x_v = place.load(x), d = «place.keep(x_v - m)»;", "x_v - m",
           "what is past the end counts as minus the mean", "values"),
    Mutant(RUNS_BACKWARD, "place.load(dy) * kink_slope(«z.constant(x)», below);", "x",
           "whether a kink is passed is asked of x", "activation"),
    Mutant(RUNS_BACKWARD, "if (masked) x_hat = «where(dy, x_hat)»;", "x_hat",
           "NaN of who is no member reaches dweight", "where"),
    Mutant(LANES, "tile.rows >= 4 && «column.count(4, 1) == 4»", "false",
           "a mask of everyone has pivots of its own", "views"),
    Mutant(LANES, "block < «kWidth»; ++block) total +=", "kWidth - 1",
           "of few columns the last block in a vector is left out", "values"),
    Mutant(LANES, "if («block < blocks») add(block, 0);", "false",
           "of bytes with few channels the last of an odd number of blocks is left out", "views"),
    Mutant(LANES, "const Full here{«begin % period» + k * kWidth};", "k * 0",
           "columns that are held are those of a walk that begins on a line", "views streamed"),
    Mutant(LANES, "return «(n > 0) & !trustworthy<S>(s, q, n)»;", "false",
           "no column is taken again, whatever its pivot", "extremes edges"),
    Mutant("cpp/include/normkit/geometry.hpp", "if («++index_ == count_») index_ = 0;", "++index_ > count_",
           "parameters go round one too late", "values"),
    Mutant(LANES, "if («t.residual.data && t.frozen») form_sum", "false",
           "frozen statistics forget to form the sum", "residual"),
    Mutant(LANES, "merge_columns(all, part, «t.geometry.columns()»);", "t.geometry.columns() - 1",
           "the last column has one span alone", "values"),
    Mutant(LANES, "count[j] = count[j] + «members.only(step, column[j], one)»;", "one",
           "who is no member of few channels is counted", "bits where"),
    Mutant(LANES_BACKWARD, "(«!follows || t.where.strides.step == g.columns()»)", "true",
           "a mask whose steps lie apart is walked as if they did not", "bits where"),
    Mutant(LANES_BACKWARD, "gx[j] += «w * column.sums.gx»,", "column.sums.gx",
           "one of two sums is folded without its weight", "values"),
    Mutant(LANES_BACKWARD, "if (t.phase == Phase::apply) «lanes.take(j, given_sums(t, first + j))»;", "(void)j",
           "given sums are not taken", "phases"),
    Mutant(LANES_BACKWARD, "if («masked») add_to(out.n + column, count[j]);", "false",
           "members are not counted", "where"),
    Mutant(LANES_BACKWARD, "mul_add(«-lanes.shift[j]», column_sums.g[k]", "0.0",
           "dweight is about a rounded mean", "values extremes"),
    Mutant("cpp/src/backend.hpp", "g.params.count > 1 && «g.run > 1»;", "true",
           "the parameter of a row of one element is not that of a statistic", "promises"),
    Mutant(LANES_BACKWARD, "if (residual) v = «v + place.load(residual)»;", "v",
           "the gradient of the returned sum is dropped", "residual"),
    Mutant("cpp/src/kernels/batches.hpp", "for (std::int64_t i = «first_»; i < kLine; ++i) to_[i]", "std::int64_t{0}",
           "the neighbor's part of a line is overwritten", "streamed"),
    Mutant("cpp/src/kernels/common.hpp", "CyclicIndex index(first, «t.given.stride», t.given.count);", "1",
           "given statistics that several rows share are one for each", "phases promises values"),
    Mutant("cpp/src/kernels/batches.hpp", "index(first * g.run, g.params.stride, g.params.count, «g.run»);", "1",
           "all rows of a batch have the weight of the first", "values promises"),
    Mutant("cpp/src/kernels/batches.hpp", "begin += kBuffer, x += «kBuffer»)", "0",
           "the end of a row with an activation is that of its beginning", "activation promises"),
    Mutant("cpp/src/kernels/batches.hpp", "++k, room += «whole_vectors(g.run)»)", "0",
           "all sums of a batch are formed in one row", "residual promises"),
    Mutant("cpp/src/kernels/batches_backward.hpp", "shift[k] = centered && n != 0 ? «sums(k).d / n» : 0;", "0.0",
           "the gradients of short rows are about a rounded mean", "values extremes promises"),
    Mutant("cpp/src/kernels/batches_backward.hpp", "mask = «batch.mask[k]»;", "batch.mask[0]",
           "the gradients of a batch have the mask of its first row", "where"),
    Mutant("cpp/src/kernels/batches.hpp", "if («members[k] == 0»)\n      batch.pivot[k]", "false",
           "a row whose first members come late has no pivot", "where"),
    Mutant("cpp/src/kernels/batches.hpp", "rstd[k] = is_norm || «n[k] > 0» ? rstd[k] : 0;", "true",
           "a row of a batch without members is scaled", "where"),
    Mutant("cpp/src/kernels/batches_backward.hpp", "++k, to += «whole_vectors(g.run)»)", "0",
           "what reaches a batch is that of its last row", "activation promises"),
    Mutant("cpp/src/kernels/batches_backward.hpp", "weight += «begin»;", "0",
           "the end of a row meets the weights of its beginning", "streamed"),
    Mutant("cpp/src/kernels/common.hpp", "write_part(«end», n);", "n",
           "the end of a row that is in the next one's line is left out", "streamed"),
    Mutant("cpp/src/kernels/common.hpp", "for (int line = «0»; line < whole_; ++line)", "1",
           "the first of the lines that were put together is left out", "streamed"),
    Mutant("cpp/src/kernels/batches_backward.hpp", "if («++lane == g.lanes») ++o", "++lane > g.lanes",
           "rows are counted on past an outer index", "layouts values"),
    # ---- formulas
    Mutant(FORMULA, "mul_add(delta, delta * («a.n * share»), b.m2)", "b.n * share",
           "the wrong weight in Chan's rule", "values"),
    Mutant(FORMULA, "return {sum, sum - sum == 0 ? «rest» : 0};", "0.0",
           "a mean of float64 is one number", "extremes phases"),
    Mutant(FORMULA, "a.n == 0 ? «b.mean_low» : both.low", "both.low",
           "a mean loses its low part beside an empty set", "phases"),
    Mutant(FORMULA, "return «s > most» ? most :", "false",
           "subnormal numbers without eps give infinite y", "edges"),
    Mutant(FORMULA, "m.n == 0 ? 0 : rstd_of(«m.m2 / m.n», d.eps)", "m.m2 / (m.n - 1)",
           "the variance is unbiased", "values"),
    Mutant(FORMULA, "centered ? «-(s.rstd * sums.g / n)» : 0", "s.rstd * sums.g / n",
           "the mean of g has the wrong sign", "values"),
    Mutant(FORMULA, "static_cast<S>(«bias - static_cast<double>(s.mean_low) * scale»)", "bias",
           "a mean is as exact as a float", "extremes values"),
    Mutant(FORMULA, "return «sum == 0» ? 0", "false",
           "constants without eps give NaN", "edges extremes"),
    # ---- schedule, plan, checks
    Mutant("cpp/src/geometry.cpp", "if (has[place] && «strides[axis] != next[place]»)", "false",
           "axes with gaps between them are taken for one", "geometry views"),
    Mutant("cpp/src/views.cpp", "place += «view.axes[axis - 1].stride - index[axis] * view.axes[axis].stride»;",
           "view.axes[axis - 1].stride", "a walk goes on where an axis has ended", "views layouts"),
    Mutant("cpp/src/cpu.cpp", "{t.geometry.lanes * each, t.geometry.run, «each», 1};", "t.geometry.members()",
           "parts of statistics lie as far apart as whole ones", "views"),
    Mutant("cpp/src/kernels/lanes.hpp", "found.low[j] = «folded.low[j]»;", "0",
           "the mean of columns loses what float64 has left over", "extremes"),
    Mutant("cpp/src/cpu.cpp", "p.count /= g.outer, p.outer = «p.count»;", "0",
           "each slab of columns has the parameters of the first", "bits"),
    Mutant("cpp/src/cpu.cpp", "strides.outer = lanes * «(t.*operand).strides.lane»;", "g.run",
           "a mask that all channels share is looked for elsewhere in each slab", "bits"),
    Mutant("cpp/src/cpu.cpp", "«gather.place(statistic)» + begin * bytes;", "gather.place(0)",
           "a statistic is gathered over the one that is written", "streamed"),
    Mutant(VIEWS, "fourth = to_step.row < 0 ? «-kBytes» : 0;", "kBytes * 0",
           "a fourth element is copied over the row before", "streamed fences"),
    Mutant(VIEWS, "«from_step.row >= kRow»;", "true",
           "a fourth element is read behind a row that is repeated", "fences"),
    Mutant("cpp/src/cpu.cpp", "ranges, «begin + units * (range + 1) / ranges», slot);",
           "begin + units * (range + 1) / ranges - (range == 0)",
           "no thread takes the last of the first range", "threads"),
    Mutant("cpp/src/cpu.cpp", "var += «m[1] / (m[2] - 1)»,", "m[1] / m[2]",
           "running_var is biased", "values"),
    Mutant("cpp/src/cpu.cpp", "if («g.lanes % period != 0») return;", "false",
           "steps are unfolded where statistics differ", "values phases"),
    Mutant("cpp/src/cpu.cpp", "g.parameter(«group / row_groups(g)», 0)", "group",
           "a group of rows is taken for an outer index", "values"),
    Mutant("cpp/src/pool.cpp", "spin = 0; «done_.load(std::memory_order_acquire) != others»;", "false",
           "a call returns before all threads are done", "threads"),
    Mutant(PLAN, "mask_fits_columns(s, g) : s.run == 1 && «s.lane == g.run»;", "true",
           "columns with gaps between them are read as if they had none", "views layouts"),
    Mutant(PLAN, "axis >= shift && «a.shape[axis - shift] == args.x.shape[axis]»;", "true",
           "a mask is walked along an axis that it does not have", "where"),
    Mutant(PLAN, "if (varying & axis) axes |= «slower | axis»;", "axis",
           "parameters that have to be repeated are so along the elements", "bits"),
    Mutant("cpp/src/cpu.cpp", "if («has_second_pass(t)») spans(mine", "t.phase != Phase::reduce",
           "dx is written where nobody wants it", "promises"),
    Mutant(PLAN, "linear && g.steps == 1 && «g.params.count == g.run») t.kind", "true",
           "weights of another period than a row are summed along it", "values layouts"),
    Mutant(PLAN, "gradient.shape[axis] == 1 || «lying[axis] == gradient.strides[axis]»", "true",
           "dweight is handed out in the order of memory", "layouts values"),
    Mutant(PLAN, "p.writes(kDbias) && «params.differ» &&", "false",
           "dbias has the axes of weight", "taken"),
    Mutant(ARGUMENTS, "return «contains(o.reads, op) && w.role != Role::running»;", "false",
           "an output may lie over an input", "errors out"),
    Mutant(ARGUMENTS, "equal(a.shape, b.shape) && «same_strides(a, b)»", "true",
           "an output may be its input in another order", "out errors"),
    Mutant(ARGUMENTS, "if («step < reach») return false;", "step == 0",
           "an output may be one element", "errors out"),
    Mutant(ARGUMENTS, "const std::int64_t reach = a.stride(axis) * («a.shape[axis] - 1»);", "a.shape[axis] - 2",
           "an array ends a row too early", "out errors"),
    Mutant(ARGUMENTS, "if («!overlap(at[k], reach_[k], at[other], reach_[other])») continue;", "true",
           "overlaps are looked for in the first call alone", "calls"),
    # ---- the gradient of a backward
    Mutant(FORMULA, "const double origin = «-shift * rstd»;", "0.0",
           "the rest of a rounded mean is forgotten", "double_backward"),
    Mutant(FORMULA, "hx = «qx - 2 * rstd * vx * gx»,", "qx - rstd * vx * gx",
           "one of two equal terms is forgotten", "double_backward"),
    Mutant(DOUBLE, "mean_shift(t, s, weighted.sums.d, «t.frozen ? 1 : weighted.n»), n =", "weighted.n",
           "the rest of a rounded mean is forgotten where statistics are constants", "double_backward"),
    Mutant(DOUBLE, "if (!t.ddx.data) row.v = kZeros<X>.value, «row.v_row = 0»;", "row.v_row = p.n",
           "rows of a ddx that is not there go on", "double_backward"),
    Mutant(DOUBLE, "dy += dy_row, v += «v_row»,", "x_row",
           "ddx is taken to lie as x does", "double_backward"),
    Mutant("cuda/double_backward.cuh", "if («p.is_member(t)»)\n        d_x = mul_add(dy, line.dy", "false",
           "statistics are taken for constants", "double_backward"),
    Mutant("cuda/double_backward.cuh", "if (dz != 0) d_x = «mul_add(dz, weight, d_x)»;", "d_x + dz",
           "what is bent forgets the weight", "double_backward"),
    Mutant(FORMULA, "k.through.of_x -= «sums.weight / n»;", "0.0",
           "what is bent leaves the deviation alone", "double_backward"),
    Mutant(FORMULA, "if (centered) k.through.constant -= «sums.bias / n»;", "0.0",
           "what is bent leaves the mean alone", "double_backward"),
    Mutant(FORMULA, "rstd * mul_add(rstd, b.hdd, origin * b.hd) + «origin * hx»;", "0.0",
           "sums of bends are not moved to the mean", "double_backward"),
    Mutant(DOUBLE, "sums(w, p.params.ddweight), «sums(w, p.params.ddbias)»}", "BendSums<double>{}",
           "a ddbias that follows the elements bends nothing", "double_backward"),
    Mutant(DOUBLE, "if (row.slope) d_dy = «d_dy * place.load(row.slope)»;", "d_dy",
           "dy is given what belongs to z", "double_backward"),
    Mutant(DOUBLE, "term = where(dy, term) + «where(dz, dz * x_hat)»;", "zero",
           "what is bent adds nothing to weights that follow the elements", "double_backward"),
    Mutant(DOUBLE, "else f(SecondPlace{o, step, 0, k, «last * width», 1, last, column});", "width",
           "steps that fill no row are left out, but for one", "double_backward"),
    Mutant(DOUBLE, "const std::int64_t column = «step % copies» / steps * columns + k,", "0",
           "what a mask takes step by step all goes to one copy of its column", "double_backward"),
    Mutant(DOUBLE, "begin(r, least(most, «least(last - r, g.lanes - r % g.lanes)»));", "last - r",
           "a batch of rows goes on in the next instance, as if it lay behind", "double_backward"),
    Mutant(DOUBLE, "for (std::int64_t copy = 1; copy < «copies»; ++copy) sum +=", "1",
           "sums of one copy of a column stand for all", "double_backward"),
    Mutant("cpp/src/kernels/batches_backward.hpp", "kBuffer), «linear ? begin : parameter», linear", "parameter",
           "weights along a row begin again with each buffer on the way back through an activation", "activation"),
    Mutant("cpp/src/kernels/lanes_backward.hpp", "kink_slope(forward(x_v, m, «scale», shift), below)", "shift",
           "which side of a kink a turned step is on is asked of something else", "activation"),
    Mutant("cpp/src/kernels/lanes_backward.hpp", "z_v = forward(x.at(step, k, n), mean, «scale», shift)", "shift",
           "what reaches turned steps is that of another z", "activation"),
    Mutant(DOUBLE, "second_row<false, kEach, kMode>(t, row, p.n, 1, {known_[«k»], 1}", "0",
           "all rows of a batch have the results of the first", "double_backward"),
    Mutant("cpp/include/normkit/activation.hpp", "positive(z, zero, «positive(zero - z, below, z)»);", "below",
           "the second derivative of elu jumps on the wrong side of 0", "activation"),
    Mutant(DOUBLE, "to[0] += «more.weight», to[1] = more.bias;", "0.0",
           "what is bent adds nothing to the weight", "double_backward"),
    Mutant("cpp/include/normkit/activation.hpp", "«z * inner_curvature»);", "constant(z, 0)",
           "the inner function of gelu_tanh is straight", "activation double_backward"),
    # ---- bindings
    Mutant("python/recent.hpp", "+ «(PyArray_ISWRITEABLE(a) ? 1 : 0)»);", "0",
           "a known plan writes what is read-only", "calls"),
    Mutant("python/calls.cpp", "op_ == Op::moments || «!placement.allows(at)») return;", "false",
           "arrays on their elements are copied after others of the same layout", "views"),
    Mutant("python/calls.cpp", "if («op_ == Op::apply» && !mean.first.is_none())", "false",
           "apply forgets what a mean has left over", "phases"),
    Mutant("python/calls.cpp", "for (const int slot : options_) «key.add_value(values[slot])»;", "void()",
           "a plan is found without its activation", "calls"),
    Mutant(PLAN, "each.strides[axis] *= «numbers»;", "1",
           "moments lie over each other", "phases"),
    Mutant("python/calls.cpp", "if («plan.empty»)\n    array[nb::ellipsis()]", "false",
           "sums over nothing are left as they were", "edges"),
    Mutant("python/output_cache.cpp", "«held_ -= h->capacity»;\n      return", "held_ += 0",
           "memory in use counts as kept", "cache"),
    # ---- Python
    Mutant("python/normkit/phases.py", "return where(left > 0, «m2 / left»,", "m2 / count",
           "correction is forgotten", "phases"),
    Mutant("python/normkit/_memory.py", "values = «self.wide(values)».sum(", 'self.wide(values).astype("float32")',
           "dbias is added up in float32", "taken values"),
    # ---- kernels of a GPU
    Mutant("cuda/finish.cuh", "for (int k = 1; k < «kStrands»; ++k) all[0] +=", "kStrands - 1",
           "the last warp's share of dweight is lost", "values"),
    Mutant("cuda/finish.cuh", "sum.m2 + «m.m2 / (m.n - 1)»,", "m.m2 / m.n",
           "running_var is biased", "values"),
    Mutant("cuda/finish.cuh", "Reduced{{weight * part.sums.g, «weight * part.sums.gx»,", "part.sums.gx",
           "one of two sums is without its weight", "values"),
    Mutant("cuda/finish.cuh", "pair[0] = s.rstd * mul_add(«-shift», pair[1], pair[0]);", "shift",
           "the gradient of a weight is moved the wrong way", "values"),
    Mutant("cuda/elements.cuh", "statistic_of<S>(solved.mean, «solved.low()», solved.rstd)", "0.0",
           "x_hat of dweight is about a rounded mean", "extremes"),
    Mutant("cuda/group.cuh", "if («k + j * meeting.size < count») all = join(all, next[j]);", "j == 0",
           "of four partial results that are read one is joined", "values"),
    Mutant("cuda/lanes.cuh", ": static_cast<int>(«(below + kStrands - 1) / kStrands»);", "below / kStrands",
           "the last steps of a tile are not taken", "values"),
    Mutant("cuda/lanes.cuh", "for (int k = 1; k < «kStrands / 2»; ++k)", "kStrands / 2 - 1",
           "the last pair of strands is left out", "values"),
    Mutant("cuda/lanes.cuh", "const double count = masked ? «some» : s.steps;", "static_cast<double>(s.steps)",
           "a mask's members are not counted", "where"),
    Mutant("cuda/runs.cuh", "left > kVector<X> ? kVector<X> : «left»};", "kVector<X>",
           "the last vector of a row reaches into the next", "values"),
    Mutant("cuda/runs.cuh", "t.rows = below < tiling.rows ? «static_cast<int>(below)» :", "tiling.rows",
           "the last tile has rows that are not there", "values"),
    Mutant("cuda/elements.cuh", "return «t.where.data && dz == 0» ? S(0)", "false",
           "NaN of who is no member reaches dweight", "where"),
]  # fmt: skip


def copy_tree() -> Path:
    """What the build wants, with all mutants of C++ in it, touching only what has changed."""
    tree = FOLDER / "tree"
    wanted = {path.relative_to(ROOT): path for name in COPIED for path in [ROOT / name, *(ROOT / name).rglob("*")]}
    for name, path in wanted.items():
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        mine = [(k, m) for k, m in enumerate(MUTANTS, 1) if Path(m.file) == name]
        content = path.read_bytes()
        if mine and name.suffix != ".py":
            text = content.decode()
            for (begin, end), k, m in sorted(((m.place(text), k, m) for k, m in mine), reverse=True):
                text = f"{text[:begin]}(normkit_mutant({k}) ? ({m.new}) : ({text[begin:end]})){text[end:]}"
            content = text.encode()
        if str(name) == "CMakeLists.txt":
            content = content.replace(b" -O3", b" -O1")  # half the time
        write(tree / name, content)
    write(FOLDER / "mutant.hpp", CHOICE.encode())
    return tree


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def build(kind: str) -> None:
    """A site with the package: the tree's Python and a library of this kind."""
    tree, folder = copy_tree(), FOLDER / f"build-{kind}"
    isa = "neon" if platform.machine() in ("aarch64", "arm64") else "avx2"
    options = {
        "NORMKIT_CUDA": "off" if kind == "cpu" else "shim",
        "NORMKIT_ISAS": isa,
        "CMAKE_CXX_FLAGS": f"-include {FOLDER / 'mutant.hpp'}",
        "Python_EXECUTABLE": sys.executable,
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    if shutil.which("ccache"):
        defined.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    subprocess.run(["cmake", "-S", tree, "-B", folder, "-G", "Ninja", *defined], check=True, stdout=subprocess.PIPE)
    subprocess.run(["cmake", "--build", folder, "--target", "_core"], check=True)
    make_site(kind, FOLDER / f"site-{kind}")


def make_site(kind: str, site: Path) -> None:
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(FOLDER / "tree/python/normkit", site / "normkit")
    (library,) = (FOLDER / f"build-{kind}").glob("_core*.so")
    shutil.copy(library, site / "normkit")


def suites(kind: str, near: str) -> list[tuple[dict[str, str], list[Path]]]:
    """What runs, one after the other: environment and files. None named: all that is in pyproject.toml."""

    def files(names: str) -> list[Path]:
        return [ROOT / f"tests/test_{name}.py" for name in names.split()]

    fake = {"NORMKIT_TEST_ARRAYS": "fake"}
    first = [({} if kind == "cpu" or near in OF_SHIM else fake, files(near))] if near else []
    return first + ([({}, [ROOT / "tests"])] if kind == "cpu" else [({}, files(OF_SHIM)), (fake, files(OF_VALUES))])


def killer(kind: str, number: int, site: Path, near: str) -> str | None:
    """The test that fails; None: all pass."""
    for extra, files in suites(kind, near):
        environment = {**os.environ, **extra, "PYTHONPATH": str(site), "NORMKIT_MUTANT": str(number)}
        plain = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "-rfE"]
        command = [sys.executable, "-m", "pytest", *plain, *map(str, files)]
        try:
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=HANGS)
        except subprocess.TimeoutExpired:
            return f"no end of {' '.join(f.name for f in files)}"
        if done.returncode == 0:
            continue
        said = done.stdout + done.stderr
        if done.returncode in (3, 4, 5):
            raise RuntimeError(said[-2000:])
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", said, re.MULTILINE)
        crashed = re.search(r'File ".*/tests/(test_\w+\.py)", line \d+ in (test_\w+)', said)
        if found:
            return found.group(1).removeprefix("tests/")
        return f"{crashed.group(1)}::{crashed.group(2)}, which crashes" if crashed else f"status {done.returncode}"
    return None


def try_mutant(number: int) -> str | None:
    mutant = MUTANTS[number - 1] if number else None
    if not mutant or not mutant.file.endswith(".py"):
        kind = mutant.build if mutant else "cpu"
        return killer(kind, number, FOLDER / f"site-{kind}", mutant.near if mutant else "")
    site = FOLDER / f"site-{number}"
    make_site(mutant.build, site)
    path = site / Path(mutant.file).relative_to("python")
    text = path.read_text()
    begin, end = mutant.place(text)
    path.write_text(f"{text[:begin]}({mutant.new}){text[end:]}")
    try:
        return killer(mutant.build, number, site, mutant.near)
    finally:
        shutil.rmtree(site)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="mutants of files whose names contain this, or numbers: 3,17")
    parser.add_argument("--jobs", type=int, default=1, help="suites at a time")
    parser.add_argument("--again", action="store_true", help="forget what an earlier run has found")
    parser.add_argument(
        "--unchanged", action="store_true", help="also run the whole suite with no mutant: it must pass"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    metadata.version("normkit")  # without one these tests fail whatever the mutant, and would be taken for killers
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "log.jsonl"
    if args.again:
        log.unlink(missing_ok=True)
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = {(row["file"], row["marked"], row["new"]): row for row in known}
    numbers = [int(n) for n in args.only.split(",")] if re.fullmatch(r"[\d,]+", args.only) else None
    chosen = [k for k, m in enumerate(MUTANTS, 1) if (k in numbers if numbers else args.only in m.file)]
    todo = [k for k in chosen if (MUTANTS[k - 1].file, MUTANTS[k - 1].marked, MUTANTS[k - 1].new) not in found]
    for mutant in MUTANTS:
        mutant.place((ROOT / mutant.file).read_text())
    for kind in sorted({MUTANTS[k - 1].build for k in todo}):
        build(kind)
    if args.unchanged and (failed := try_mutant(0)):
        raise SystemExit(f"without a mutant {failed} fails")
    start = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(try_mutant, k): k for k in todo}
        for done, future in enumerate(as_completed(running), 1):
            mutant, by = MUTANTS[running[future] - 1], future.result()
            row = {"file": mutant.file, "marked": mutant.marked, "new": mutant.new, "reason": mutant.reason, "by": by}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            found[mutant.file, mutant.marked, mutant.new] = row
            left = (time.monotonic() - start) / done * (len(todo) - done) / 60
            told = f"killed by {by}" if by else "SURVIVES"
            print(
                f"[{done}/{len(todo)}, {left:.0f} min left] {running[future]} {mutant.file}: {mutant.reason}: {told}",
                flush=True,
            )
    rows = [found[MUTANTS[k - 1].file, MUTANTS[k - 1].marked, MUTANTS[k - 1].new] for k in chosen]
    survivors = [row for row in rows if not row["by"]]
    print(f"{len(rows) - len(survivors)} of {len(rows)} killed")
    for row in survivors:
        print(f"survives: {row['file']}: {row['reason']}: {row['marked']} -> {row['new']}")
    return bool(survivors)


if __name__ == "__main__":
    raise SystemExit(main())
