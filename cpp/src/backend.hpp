// What one instruction set provides: a name and a few functions over a Task. Included by baseline and per-ISA code
// alike, so it holds data and constexpr arithmetic only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "normkit/activation.hpp"
#include "normkit/dtype.hpp"
#include "normkit/formula.hpp"
#include "normkit/geometry.hpp"

namespace normkit {

/// The dtype in which kernels read elements of `dtype`. Of integers they have loops for those that pictures and scans are made of.
constexpr Dtype read_dtype(Dtype dtype) { return dtype <= Dtype::int16 ? dtype : Dtype::float32; }

/// An array as a kernel sees it. Inputs are never written.
struct Operand {
  std::byte* data = nullptr;
  Dtype dtype = Dtype::float32;
  Strides strides;
  /// For the host: the view of an array that does not lie as kernels want it, in Job::views; -1: it does. Kernels are
  /// given copies of its parts, for which `strides` are right.
  int view = -1;
};

/// Weight or bias, dense in the order of Geometry::parameter; without data it stands for 1 or 0. `offset` is added to
/// each element.
struct Param {
  const std::byte* data = nullptr;
  Dtype dtype = Dtype::float32;
  double offset = 0;
};

/// Statistics that are not computed but given: element (statistic / stride) % count of `mean` and of `scale`. `scale`
/// holds variances where is_variance is true, else 1/std.
struct Given {
  const std::byte* mean = nullptr;
  const std::byte* scale = nullptr;
  Dtype mean_dtype = Dtype::float32, scale_dtype = Dtype::float32;
  std::int64_t stride = 1, count = 1;
  bool is_variance = false;
  const std::byte* mean_low = nullptr;  // what `mean` has left over, if x is float64; may be null
  Dtype low_dtype = Dtype::float64;
};

/// `runs` reduces along the contiguous run; `lanes` reduces across steps, with vectors along the contiguous columns,
/// and then folds neighboring columns into one statistic.
enum class Traversal : std::uint8_t { runs, lanes };

/// How the parameters meet a statistic, which decides where their gradients are summed.
enum class ParamKind : std::uint8_t {
  none,       // no parameters, or no gradients of them
  statistic,  // one parameter for all members of a statistic
  piece,      // constant over pieces of a run
  row,        // one for each element of a run, the same for all statistics (of one `outer`)
  column,     // lanes: one for each column
  element,    // one for each element of x
};

/// What a task does: all of it, or one of its two halves. Forward: moments, then y. Backward: sums, then dx.
enum class Phase : std::uint8_t { both, reduce, apply };

/// How memory is walked: policy.cpp chooses it, and results do not depend on it.
struct Walk {
  bool stream_stores = false;  // outputs go past the caches
  bool overlapped = false;     // each statistic (runs) or outer index (lanes) is written while the next is read
  bool batched = false;        // statistics of short runs are solved together
  bool forms_rows = false;     // rows of a batch are formed in scratch: x + residual, or dy through an activation
  bool tiled = false;          // rows that are solved together are written side by side
  bool whole_lines = false;    // rows of the output begin and end with lines of memory
  // How far fetches run ahead while a statistic is written; lanes: how much of the next slab is fetched.
  std::int64_t fetch_bytes = 0;
  // Where a statistic is written while the next is read: how much further fetches into the second-level cache run than those into
  // the first.
  std::int64_t far_bytes = 0;
  // Where x or dy is a copy of a part of an array: how far behind it lies what is copied next, which fetches into the second-level
  // cache are for; 0 where it is no copy, or where that is too far to tell.
  std::int64_t next_x = 0, next_dy = 0;
};

/// Copies members [begin, end) of a statistic of x to its place, for kernels that write one statistic while they read the next: there
/// are two places, in turn. Returns how far behind the copy lies what is copied soon, or 0, see Walk::next_x.
struct Gather {
  std::int64_t (*copy)(const Gather&, std::int64_t statistic, std::int64_t begin, std::int64_t end) = nullptr;
  const void* job = nullptr;  // for copy()
  std::byte* buffer = nullptr;
  std::int64_t place_bytes = 0;

  constexpr std::byte* place(std::int64_t statistic) const { return buffer + statistic % 2 * place_bytes; }
};

struct Task {
  Geometry geometry;
  Traversal traversal = Traversal::runs;
  ParamKind kind = ParamKind::none;
  Phase phase = Phase::both;
  bool centered = true;
  bool frozen = false;         // statistics are given and take no part in the gradient
  Walk walk;
  Gather gather;  // null: arrays are read where they lie
  Denominator denominator;
  Activation activation;  // of y; in backward, dy is the gradient of what it gave
  Operand x, y, dy, dx;
  bool twice = false;    // the gradient of a backward, with respect to dy, x and weight
  Operand ddx, d_dy;     // of that: the gradient with respect to dx, and what it gives for dy
  Operand where;             // one byte an element, members are those that are not 0; without data all are
  Operand source, residual;  // forward: x is written first, as source + residual. Backward: residual is added to dx
  Param weight, bias;
  Param slopes;  // of prelu
  Param ddweight, ddbias;
  Given given;
  std::byte* mean = nullptr;  // of compute_dtype(x), one element per statistic; may be null
  std::byte* rstd = nullptr;
  double* moments = nullptr;   // out: mean, m2, count and mean_low of each statistic; may be null
  double* sums = nullptr;      // backward: the sums of each statistic, out of Phase::reduce, into Phase::apply
  const double* counts = nullptr;    // Phase::apply of backward: members of each statistic
  double* dparams = nullptr;         // partial sums of dweight and dbias, see dparam_units(); may be null
  std::byte* dweight_out = nullptr;  // ParamKind::element: final values of compute_dtype(x), written in place
  std::byte* dbias_out = nullptr;
  double* partials = nullptr;  // split schedule: what each span found
  double* solved = nullptr;    // split schedule: what finish() made of the partials, solved_doubles() per unit
};

constexpr bool has_activation(const Task& t) { return t.activation.kind != ActivationKind::none; }

/// Gradients of parameters that follow the elements are summed while dx is written, not before.
constexpr bool writes_element_gradients(const Task& t) {
  return t.kind == ParamKind::row || t.kind == ParamKind::element;
}
/// True where the elements are walked once more when statistics are known: for y or dx, which nobody may want, or for such gradients.
[[gnu::always_inline]] constexpr bool has_second_pass(const Task& t) {
  return t.phase != Phase::reduce && (t.y.data || t.dx.data || writes_element_gradients(t));
}

// The reduction tree. A chunk is summed in the compute type, chunks are merged in order to spans and spans to a
// statistic in double. The tree is a function of one statistic's geometry: never of the batch, of the thread count or
// of the addresses. The sizes: 4096 floats and their gradient fit the first-level cache twice over; a span is what one
// thread takes at a time.
inline constexpr std::int64_t kChunk = 4096;
inline constexpr std::int64_t kSpanChunks = 4;
/// The steps of a span in the lanes traversal, where a span is one chunk for all columns.
inline constexpr std::int64_t kSpanSteps = 512;

/// The chunks of one statistic (runs) or of one outer index (lanes).
struct Chunks {
  std::int64_t rows;     // steps in a chunk
  std::int64_t per_run;  // chunks in a run; where it is more than one, rows is one
  std::int64_t count;
  std::int64_t spans;
};

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

NORMKIT_HD constexpr Chunks chunks_of(const Geometry& g, Traversal traversal) {
  Chunks c{1, 1, 1, 1};
  if (traversal == Traversal::lanes) {
    c.rows = kSpanSteps, c.count = c.spans = ceil_div(g.steps, c.rows);
    return c;
  }
  if (g.run < kChunk) c.rows = kChunk / g.run;
  else c.per_run = ceil_div(g.run, kChunk);
  c.count = ceil_div(g.steps, c.rows) * c.per_run;
  c.spans = ceil_div(c.count, kSpanChunks);
  return c;
}

/// Bytes that fetches into the second-level cache run ahead of the loads. Layer norm (65536, 128): 1.2 of a copy; 6 KB ahead
/// 2.1, 12 KB 1.3, 48 KB 1.25 (Zen 5, g++ 12, one thread, medians of pairs).
inline constexpr std::int64_t kFarAhead = std::int64_t{24} << 10;

/// Bytes that fetches into the first-level cache run ahead. Where sums alone are taken: one volume of 256^3 1.68 of a copy, with
/// far fetches 1.76. Where the next statistic is read while one is written: (16, 256, 32, 32) 1.1, 4 KB ahead 1.2, 2 KB 1.4, with
/// far fetches 1.15; (8, 64, 128, 128) 1.24, 4 KB 1.22, 2 KB 1.28, far 1.46.
inline constexpr std::int64_t kNearAhead = 8192;
constexpr std::int64_t near_ahead(std::int64_t run_bytes) { return run_bytes <= 8192 ? kNearAhead : kNearAhead / 2; }

/// How many statistics are solved together where each is one run of one chunk at most; 0 where each goes by itself. A batch of
/// short runs, of 4 KB or less, is 32 KB, so that two and what is fetched for a third stay in the second-level cache; of longer
/// ones it is what is written side by side.
inline constexpr std::int64_t kMostBatchRows = 16;
/// The longest row that goes in a batch with a mask: 16 additions to each of 4 vectors of 16 lanes, see pivot_sums().
inline constexpr std::int64_t kMaskedRun = 1024;
constexpr bool is_short(const Geometry& g, std::int64_t element_bytes) { return g.run * element_bytes <= 4096; }
[[gnu::always_inline]] constexpr std::int64_t batch_rows(const Geometry& g, std::int64_t element_bytes) {
  const std::int64_t row_bytes = g.run * element_bytes, most = element_bytes == 8 ? 8 : kMostBatchRows;
  if (g.steps != 1 || g.run > kChunk) return 0;
  if (!is_short(g, element_bytes)) return 4;
  return row_bytes * most <= 32768 ? most : 32768 / row_bytes / 4 * 4;  // whole tiles
}

/// True where rows of x may go in batches to y: loops for all pairs of dtypes would be a tenth of the library, and bytes are
/// what pictures are made of.
constexpr bool goes_in_batches(Dtype x, Dtype y) { return x == y || x == Dtype::uint8; }

/// Statistics whose parameter gradients are summed together, in ParamKind::row.
inline constexpr std::int64_t kRowGroup = 64;
constexpr std::int64_t row_groups(const Geometry& g) { return ceil_div(g.lanes, kRowGroup); }

/// Pairs (sum of dy * x_hat, sum of dy) that backward leaves in `dparams`: doubles, but for ParamKind::row, where a group
/// holds run sums of dy * x_hat and then run sums of dy, all in the compute type.
constexpr std::int64_t dparam_units(const Geometry& g, ParamKind kind) {
  switch (kind) {
    case ParamKind::statistic: return g.statistics();
    case ParamKind::piece: return g.size() / g.params.stride;
    case ParamKind::row: return g.outer * row_groups(g) * g.run;
    case ParamKind::column: return g.outer * g.columns();
    default: return 0;
  }
}

/// Columns of the table that apply goes round: where there are few columns, the table repeats them for several steps.
[[gnu::always_inline]] constexpr std::int64_t table_period(const Geometry& g) {
  return ceil_div(64, g.columns()) * g.columns();
}

/// Elements of an array of columns in scratch: whole vectors, and four vectors more, so that four may begin anywhere in
/// the period. The four also keep neighboring arrays from lying whole pages apart.
constexpr std::int64_t whole_vectors(std::int64_t columns) { return ceil_div(columns, 16) * 16; }
[[gnu::always_inline]] constexpr std::int64_t array_of_columns(const Geometry& g) {
  return whole_vectors(table_period(g)) + 64;
}

/// True where columns fill so little of a vector of 64 bytes that several steps of them are turned, and summed together; 8 to 11 where
/// a byte of the mask stands for a whole step. Masks are turned into floats, which doubles do without.
[[gnu::always_inline]] constexpr bool turns_columns(const Task& t) {
  const bool of_steps = t.where.data && t.where.strides.run == 0;
  return t.x.dtype == Dtype::float64 ? t.geometry.columns() < 8 && !t.where.data
                                     : t.geometry.columns() < (of_steps ? 12 : 8);
}

/// Arrays of columns in the table of the lanes traversal.
inline constexpr std::int64_t kTableColumns = 10;

/// The dtype in which gradients of parameters are kept that follow the elements.
constexpr Dtype element_gradient_dtype(const Task& t) { return t.twice ? Dtype::float64 : compute_dtype(t.x.dtype); }

/// True where all members of a statistic share one parameter.
NORMKIT_HD constexpr bool constant_in_statistic(const Geometry& g) {
  const ParamMap& p = g.params;
  if (p.count == 1) return true;
  return p.stride % g.run == 0 &&
         (g.steps == 1 || g.columns() % (p.stride * p.count) == 0 || p.stride % (g.steps * g.columns()) == 0);
}

/// True where the parameter of a column is the same on every step.
NORMKIT_HD constexpr bool constant_in_column(const Geometry& g) {
  const ParamMap& p = g.params;
  return p.count == 1 || g.columns() % (p.stride * p.count) == 0 || p.stride % (g.steps * g.columns()) == 0;
}

/// For the gradient of a backward: sums of a statistic or of a column, those through a bent activation, of which a statistic has
/// three sets, and what is known of a statistic and of a column.
inline constexpr int kSecondDoubles = 9, kBendDoubles = 5, kSecondSolved = 9, kSecondTable = 17;

/// How many steps of few columns lie side by side in the gradient of a backward, as copies of the columns that fill vectors.
NORMKIT_HD constexpr std::int64_t second_copies(const Geometry& g) {
  std::int64_t copies = 1;
  while (g.columns() < 16 && 2 * copies * g.columns() <= 64 && constant_in_column(g)) copies *= 2;
  return copies;
}
NORMKIT_HD constexpr std::int64_t whole_second_columns(const Geometry& g) {
  return whole_vectors(second_copies(g) * g.columns());
}

/// Doubles of the sums of a statistic (runs) or of a column (lanes); the parameters of a column may be left for later.
NORMKIT_HD constexpr int second_doubles(const Task& t) {
  if (t.traversal == Traversal::runs) return kSecondDoubles + 3 * kBendDoubles;
  if (!is_bent(t.activation.kind)) return kSecondDoubles;
  return kSecondDoubles + (constant_in_column(t.geometry) ? 1 : 3) * kBendDoubles;
}

/// Doubles of one entry of Task::partials: moments, or the sums of backward and the count, of a span; of all columns of
/// one in the lanes traversal.
NORMKIT_HD constexpr std::int64_t partial_doubles(const Task& t, bool is_backward) {
  const bool four = is_backward || compute_dtype(t.x.dtype) == Dtype::float64;
  const std::int64_t quantities = t.twice ? second_doubles(t) : four ? 4 : 3;
  const std::int64_t columns = t.twice ? whole_second_columns(t.geometry) : whole_vectors(t.geometry.columns());
  return t.traversal == Traversal::lanes ? quantities * columns : quantities;
}

/// Doubles of one entry of Task::solved: a Solved (runs), or the table of the columns of one outer index (lanes).
NORMKIT_HD constexpr std::int64_t solved_doubles(const Task& t) {
  if (t.twice) return t.traversal == Traversal::lanes ? kSecondTable * whole_second_columns(t.geometry) : kSecondSolved;
  return t.traversal == Traversal::lanes ? kTableColumns * array_of_columns(t.geometry) : 6;
}

/// Doubles of scratch that a thread needs for one outer index of the lanes traversal: sums of all spans, of one and of its
/// blocks, and the table, of which there are two where one outer index is written while the next is read; or a table and two
/// sets of sums for the gradient of a backward.
constexpr std::int64_t column_doubles(const Task& t) {
  if (t.traversal != Traversal::lanes) return 0;
  return (t.twice ? kSecondTable + 2 * second_doubles(t) : 2 * 4 + 4 + 2 * kTableColumns) *
         array_of_columns(t.geometry);
}

/// Doubles for the rows of one batch.
[[gnu::always_inline]] constexpr std::int64_t batch_doubles(const Geometry& g, std::int64_t element_bytes) {
  return batch_rows(g, element_bytes) * whole_vectors(g.run) * element_bytes / 8;
}

/// Units of a fused schedule: statistics (runs), groups of them where weights along the row want their gradients summed,
/// outer indices (lanes).
constexpr std::int64_t fused_units(const Geometry& g, Traversal traversal, ParamKind kind) {
  if (traversal == Traversal::lanes) return g.outer;
  return kind == ParamKind::row ? g.outer * row_groups(g) : g.statistics();
}

/// True of an instruction set whose registers hold `vectors` vectors of 16 floats, where that is enough for some loops;
/// else policy.cpp does not ask for these, and they are not compiled. Loops over several vectors, loops of known
/// length, loops over short rows with a mask, and loops that read one statistic and write another want 8. With weights along the rows the last keep a
/// dozen vectors at hand: with 8 (AVX2) layer norm (4096, 768) took 1.6 of a copy in tiles, 1.3 without; with 32 1.2
/// and 1.4.
constexpr bool is_wide(int vectors) { return vectors >= 8; }
constexpr bool can_hold_rows(int vectors) { return vectors >= 16; }

/// True where weights vary from element to element of a run.
[[gnu::always_inline]] constexpr bool follows_elements(const Geometry& g) {
  return g.params.stride == 1 && g.params.count > 1 && g.run > 1;
}

/// True where every row has the same weights, one for each element.
[[gnu::always_inline]] constexpr bool weighs_elements(const Geometry& g) {
  return follows_elements(g) && g.params.count == g.run && g.params.outer == 0;
}

/// The entry points of one direction. Fused: a range counts fused_units(), each read, solved and written while it
/// is in cache. Split, for few and large statistics: a range counts spans of statistics (runs) or of outer indices (lanes),
/// in phases: sums fill `partials`, finish() merges them into `solved` (its range counts statistics or outer indices),
/// apply writes. Both give the same bits. `scratch` is the calling thread's own, as long as cpu.cpp carves it.
struct Loops {
  void (*fused)(const Task&, std::int64_t begin, std::int64_t end, double* scratch);
  void (*sums)(const Task&, std::int64_t begin, std::int64_t end, double* scratch);
  void (*finish)(const Task&, std::int64_t begin, std::int64_t end);
  void (*apply)(const Task&, std::int64_t begin, std::int64_t end);
};

/// One instruction set.
struct Isa {
  const char* name;
  Loops forward, backward, double_backward;
  /// Merges n sets of moments (mean, m2, count and mean_low each) into as many others.
  void (*merge)(double* into, const double* from, std::int64_t n, Dtype compute);
  /// How many vectors of 16 floats the registers hold.
  int vectors;
};

}  // namespace normkit
