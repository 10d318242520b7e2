#include "policy.hpp"

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include <algorithm>
#include <iterator>

namespace normkit {
namespace {

// Figures: float32, Zen 5 (1 MB of second-level cache a core), g++ 12, medians of pairs.

/// Below this many elements waking a thread (5 us or so) costs more than it saves.
constexpr std::int64_t kParallelElements = 16384;

/// Bytes of the second-level cache, which is a core's own.
std::int64_t second_level_cache() {
  static const std::int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return static_cast<std::int64_t>(found);
#endif
    return std::int64_t{1} << 20;  // the machine does not say
  }();
  return bytes;
}

/// Working sets above this have left the core's caches before anybody reads the output: stores go past them. A copy of 16 MB
/// takes 1.8 times as long with plain stores; at 2 to 4 MB both take the same.
std::int64_t streamed_bytes() { return 4 * second_level_cache(); }

/// The largest statistic of which the next is fetched while one is written: both must fit.
std::int64_t fetched_bytes() { return second_level_cache() / 2; }

/// While a statistic is written, what is fetched must lie past what is in use: past the next batch, or one run further. Layer
/// norm (4096, 4096): 1.45 of a copy, 2.2 without fetching the next row.
std::int64_t fetch_bytes_of(const Geometry& g, std::int64_t element_bytes, bool one_run) {
  const std::int64_t run_bytes = g.run * element_bytes, batch_bytes = batch_rows(g, element_bytes) * run_bytes;
  if (batch_bytes > 0) return std::max(kFarAhead, 2 * batch_bytes);
  return kFarAhead + (one_run && run_bytes <= fetched_bytes() ? run_bytes : 0);
}

/// Long runs are read a second time from behind the second-level cache, which then has enough to fetch: (2, 32, 96, 96, 96) 1.75 of
/// a copy with fetches far ahead, 1.5 without; (8, 64, 128, 128) 1.25 and 1.8 (Zen 4).
std::int64_t far_bytes_of(std::int64_t run_bytes) { return run_bytes <= fetched_bytes() ? kFarAhead : 0; }

/// The largest row that x + residual is formed in: it stays from its statistics to its output. (16, 256, 32, 32) with a
/// residual: 2.0 times a call without, 3.0 where the sum is formed in y.
std::int64_t sum_row_bytes() { return second_level_cache() / 4; }

bool in_place(const Task& t, const Operand& out) { return out.data == t.x.data || out.data == t.dy.data; }

/// The largest statistic that is written while the next is read: both pass through the caches meanwhile, if not the
/// second-level one, then the one behind it. Rows of 1 MB: 1.5 of a copy without, 1.2 with; rows of 4 MB 1.4 and 1.2,
/// of 8 MB no difference.
std::int64_t overlapped_bytes() { return 8 * second_level_cache(); }

/// Shorter runs have too few whole blocks, and go in batches. Runs of 512: 0.75 of the time in batches (Zen 4).
constexpr std::int64_t kOverlappedRun = 768;

/// True where nobody asked for x + residual.
bool forms_sum_in_output(const Task& t) { return !t.dy.data && t.residual.data && t.x.data == t.y.data; }

bool finds_statistics(const Task& t) { return !t.frozen && t.phase == Phase::both; }

/// True where each statistic, or outer index of lanes, can be written while the next one is read.
bool overlaps(const Task& t, const Operand& out, const Isa& isa) {
  const Geometry& g = t.geometry;
  const bool is_forward = !t.dy.data;
  const std::int64_t element_bytes = (is_forward ? 1 : 2) * size_of(t.x.dtype);
  if (!is_wide(isa.vectors) || t.where.data || t.residual.data || has_activation(t) || !finds_statistics(t) ||
      out.dtype != t.x.dtype)
    return false;
  if (t.traversal == Traversal::runs)
    return (!follows_elements(g) || (is_forward && can_hold_rows(isa.vectors))) && g.run >= kOverlappedRun &&
           g.members() * element_bytes <= overlapped_bytes();
  const bool dense = t.x.strides.step == g.columns() && out.strides.step == g.columns();
  return is_forward && dense && g.outer > 1 && constant_in_column(g) && !turns_columns(t) &&
         g.steps * g.columns() * element_bytes <= overlapped_bytes();
}

/// True where rows of an array are as long as lines of memory and whole lines apart.
bool rows_are_whole_lines(const Operand& a, const Geometry& g) {
  const auto is_whole = [&](std::int64_t elements) { return elements * size_of(a.dtype) % 64 == 0; };
  return is_whole(g.run) && (g.lanes == 1 || is_whole(a.strides.lane)) && (g.outer == 1 || is_whole(a.strides.outer));
}

/// True where rows are written side by side. Those without weights along them share nothing: of 400 elements they take 1.7 times as
/// long in tiles (Zen 4). Forward, rows of up to 8 vectors stay in registers instead. Backward, tiles are
/// for rows that share more than the first-level cache has room for: layer norm (4096, 4096) takes 0.8 of the time in them, on
/// Zen 4 0.9; rows of 3 KB 0.9, on Zen 4 1.15, of 2 KB there 1.55.
bool has_tiles(const Task& t, const Operand& out, const Isa& isa) {
  const Geometry& g = t.geometry;
  const std::int64_t vector = t.x.dtype == Dtype::float64 ? 8 : 16;
  const bool gains = t.dy.data ? is_wide(isa.vectors) && !is_short(g, size_of(t.x.dtype))
                               : can_hold_rows(isa.vectors) && g.run > 8 * vector;
  return gains && weighs_elements(g) && !t.frozen && !t.where.data && !t.residual.data && !has_activation(t) &&
         g.steps == 1 && t.x.dtype == out.dtype && rows_are_whole_lines(out, g);
}

/// True where rows go in batches: short rows, and longer rows that can be written side by side. Rows whose parameters
/// are constant are better off overlapped, one by one.
bool has_batches(const Task& t, const Operand& out, const Walk& walk, const Isa& isa) {
  const Geometry& g = t.geometry;
  const int element_bytes = size_of(t.x.dtype);
  const bool weighs = weighs_elements(g);
  if (!out.data || !goes_in_batches(t.x.dtype, out.dtype) || batch_rows(g, element_bytes) == 0 ||
      !(weighs || constant_in_statistic(g)))
    return false;
  // A mask that names whole rows has no byte for each element.
  if (t.where.data && (!is_wide(isa.vectors) || t.where.strides.run == 0 || g.run > kMaskedRun)) return false;
  if (t.slopes.data || !(finds_statistics(t) || (t.frozen && !t.dy.data))) return false;
  // Long rows beyond the caches are faster one by one where a batch would have an activation to apply or sums to form: relu on runs
  // of 1024 takes 1.8 times as long in batches, layer norm (4096, 768) with a residual 1.15, evaluation of runs of 1024 1.25 (Zen 4).
  // On the way back it is the other way round with weights along the rows: (4096, 1024) with relu 0.85, with silu 0.67.
  const bool is_long = walk.stream_stores && g.run >= kOverlappedRun;
  const bool applies = has_activation(t) && !(t.dy.data && weighs);
  if (is_long && (applies || forms_sum_in_output(t))) return false;
  if (is_long && !weighs && (t.residual.data || t.frozen)) return false;
  if (t.residual.data && (t.dy.data || !is_short(g, element_bytes))) return false;
  // What reaches rows through an activation takes the place of dy, so it has to be of its type.
  if (t.dy.data && has_activation(t) && t.x.dtype != compute_dtype(t.x.dtype)) return false;
  // Weights along a row are converted once for all batches; rows one by one have the same bits, see sums_along().
  if (t.dy.data && weighs) return t.kind == ParamKind::none || t.kind == ParamKind::row;
  const bool whole = t.kind == ParamKind::none || t.kind == ParamKind::statistic || t.kind == ParamKind::row;
  return (!t.dy.data || whole) && (is_short(g, element_bytes) || walk.tiled) &&
         (!walk.overlapped || (weighs && walk.tiled));
}

// ---- blocks that are gathered ------------------------------------------------------------------------------------

/// The most that buffers of one thread hold: less than 1 MB, and with what a call has besides in a second-level cache.
constexpr std::int64_t kBufferBytes = std::int64_t{768} << 10;

/// Elements of x that are gathered together where statistics are small.
constexpr std::int64_t kBlockElements = 32768;

std::int64_t elements_of_unit(const Task& t) {
  const Geometry& g = t.geometry;
  if (t.traversal == Traversal::lanes) return g.steps * g.columns();
  return g.members() * (t.kind == ParamKind::row ? std::min(g.lanes, kRowGroup) : 1);
}

std::int64_t elements_of_span(const Task& t) {
  const Geometry& g = t.geometry;
  if (t.traversal == Traversal::lanes) return std::min(g.steps, kSpanSteps) * g.columns();
  return std::min(g.members(), kSpanChunks * kChunk);
}

std::int64_t bytes_of_block(const Task& t, std::int64_t elements) {
  std::int64_t bytes = 0;
  for (const auto operand : kViewed)
    if ((t.*operand).view >= 0) bytes += buffer_bytes(elements, (t.*operand).dtype);
  return bytes;
}

/// Spans of a statistic can be worked on apart, but for gradients of pieces, which are summed along with it, and of rows, of
/// which each thread takes several.
bool can_gather_spans(const Task& t) {
  return t.kind != ParamKind::piece && t.kind != ParamKind::row &&
         bytes_of_block(t, elements_of_span(t)) <= kBufferBytes;
}
bool can_gather_units(const Task& t) { return bytes_of_block(t, elements_of_unit(t)) <= kBufferBytes; }

}  // namespace

bool gathers(const Task& t) {
  return std::any_of(std::begin(kViewed), std::end(kViewed), [&](auto operand) { return (t.*operand).view >= 0; });
}

bool can_gather(const Task& t) { return can_gather_units(t) || can_gather_spans(t); }

Policy policy_for(const Task& t, int threads, const Isa& isa) {
  const Geometry& g = t.geometry;
  const bool is_forward = !t.dy.data;
  const std::int64_t x_bytes = size_of(t.x.dtype), run_bytes = g.run * x_bytes;
  const bool one_run = t.traversal == Traversal::runs && g.steps == 1;
  Policy p;
  p.units = fused_units(g, t.traversal, t.kind);
  p.statistics = t.traversal == Traversal::lanes ? g.outer : g.statistics();
  p.spans = chunks_of(g, t.traversal).spans;
  p.threads = g.size() < kParallelElements ? 1 : threads;
  // Too few units to keep all threads busy: each statistic is shared among them. Gradients of pieces are summed along with a
  // statistic and cannot be shared.
  p.split = p.threads > 1 && p.units < 3 * p.threads && p.spans > 1 && t.kind != ParamKind::piece;
  const bool gathered = gathers(t);
  if (gathered) {
    p.split = p.split && can_gather_spans(t);
    p.by_spans = !p.split && !can_gather_units(t);
    const bool whole = !p.split && !p.by_spans;
    const std::int64_t elements = whole ? elements_of_unit(t) : elements_of_span(t);
    // Two, where they fit: one of them is written while the other is read. Statistics of 128 and 256 KB: 0.85 of the time.
    const std::int64_t least = whole && bytes_of_block(t, 2 * elements) <= fetched_bytes() ? 2 : 1;
    p.block = std::min(std::max(kBlockElements / elements, least), whole ? p.units : p.spans);
    while (p.block > 1 && bytes_of_block(t, p.block * elements) > kBufferBytes) p.block /= 2;
    p.buffer = bytes_of_block(t, p.block * elements);
  }

  if (t.twice) {
    const std::int64_t read_and_written = gathered ? 0 : 5 * g.size() * x_bytes;
    p.walk.stream_stores = t.x.dtype == Dtype::float32 && read_and_written >= streamed_bytes();
    p.walk.far_bytes = read_and_written >= second_level_cache() ? kFarAhead : 0;
    return p;
  }

  if (forms_sum_in_output(t) && !gathered && !p.split && one_run && run_bytes <= sum_row_bytes())
    p.sum_row = run_bytes / 8 + 8;

  const Operand& out = is_forward ? t.y : t.dx;
  const std::int64_t moved = g.size() * (is_forward ? x_bytes + size_of(out.dtype) : 3 * x_bytes);
  const bool aliased = p.sum_row ? out.data == t.source.data : in_place(t, out);
  p.walk.stream_stores = out.data && out.view < 0 && !aliased && moved >= streamed_bytes();
  p.walk.whole_lines = reinterpret_cast<std::uintptr_t>(out.data) % 64 == 0 && rows_are_whole_lines(out, g);
  p.walk.overlapped = p.walk.stream_stores && !p.split && overlaps(t, out, isa);
  p.walk.tiled = has_tiles(t, out, isa);
  p.walk.batched = has_batches(t, out, p.walk, isa);
  p.walk.forms_rows = p.walk.batched && (is_forward ? p.sum_row > 0 : has_activation(t));
  if (p.walk.batched) p.sum_row = 0;
  const std::int64_t place = gathered ? bytes_of_block(t, elements_of_unit(t)) : 0;
  p.gathers_chunks = gathered && is_forward && t.traversal == Traversal::runs && p.walk.overlapped && !p.walk.batched &&
                     !p.by_spans && elements_of_unit(t) >= 2 * kChunk && 2 * place <= kBufferBytes;
  if (p.gathers_chunks) p.buffer = 2 * place;
  p.walk.fetch_bytes = t.traversal == Traversal::lanes ? (moved >= streamed_bytes() ? streamed_bytes() : 0)
                                                       : fetch_bytes_of(g, x_bytes, one_run);
  p.walk.far_bytes = far_bytes_of(is_forward ? run_bytes : 2 * run_bytes);
  return p;
}

}  // namespace normkit
