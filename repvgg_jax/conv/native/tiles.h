// The same products with AMX: 16 x 16 sums in a tile register of 16 rows with 64 bytes each.

#pragma once

#include "halves.h"

namespace repvgg {

// Some pixels of one output row: where they are read from, and where they are written.
template <typename Kind>
struct Chunk {
  const typename Kind::Element* from;
  typename Kind::Out* to;
};

// The products for `rows` rows of `columns` pixels, in chunks of equal size, so that the tiles keep their shape: the
// last chunk of a row may compute some pixels again. `at(row, column)` returns a chunk.
template <typename Kind, typename At>
void in_tiles(int64_t rows, int64_t columns, const At& at, int64_t panels, const Left& left,
              const typename Kind::Weight* b, int64_t panel, const typename Kind::Ends& ends, int64_t out_row,
              int64_t width);

}  // namespace repvgg

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define REPVGG_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace repvgg {

constexpr int TILE = 16;         // rows of a tile
constexpr int TILE_BYTES = 64;   // bytes of a row

// Whether the operating system allows this process to use tiles; a process must request permission once.
inline bool tiles_allowed() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;
  static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return allowed;
}

// The compiler does not know what a tile instruction reads, so everything stored before it must be in memory.
inline void settle() { asm volatile("" ::: "memory"); }

// Number of rows in the tiles of sums and pixels: a per-thread setting, updated only when it changes.
struct TileShape {
  static int& current() {
    thread_local int own = 0;
    return own;
  }
  static void set(int rows) {
    if (current() == rows) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; tile++) {
      config.rows[tile] = uint8_t(tile < 6 ? rows : TILE);
      config.bytes[tile] = TILE_BYTES;
    }
    settle();
    _tile_loadconfig(&config);
    current() = rows;
  }
  // A thread that has used tiles releases them; otherwise their state would be saved at every context switch.
  ~TileShape() {
    if (current()) _tile_release();
    current() = 0;
  }
};

// Tile numbers must be literals.
#define REPVGG_MULTIPLY(SUM, A, B)           \
  if constexpr (sizeof(*a) == sizeof(Half))  \
    _tile_dpbf16ps(SUM, A, B);               \
  else                                       \
    _tile_dpbusd(SUM, A, B)

// Computes the sums of up to two chunks and two panels. Tiles 0 and 1 hold the sums of the first chunk, 2 and 3 those
// of the second, 4 and 5 the pixels, 6 and 7 the weights. The sums begin with the bias, the same in each row. Elements
// past the end of a run are multiplied by the zeros that pad its weights.
template <typename Kind, bool PAIR, bool SECOND>
void add_tiles(const Left& left, const typename Kind::Element* a, const typename Kind::Element* other,
               const typename Kind::Weight* b, int64_t panel, const typename Kind::Ends& ends) {
  const int64_t row = left.row * int64_t(sizeof(*a));
  settle();
  _tile_loadd(0, ends.bias, 0);
  if (SECOND) _tile_loadd(1, ends.bias + LANES, 0);
  if (PAIR) _tile_loadd(2, ends.bias, 0);
  if (PAIR && SECOND) _tile_loadd(3, ends.bias + LANES, 0);
  for (int64_t i = 0; i < left.outer; i++)
    for (int64_t j = 0; j < left.inner; j++) {
      const int64_t run = i * left.outer_step + j * left.inner_step;
      for (int64_t k = run; k < run + left.length; k += Kind::RUN, b += Kind::RUN * LANES) {
        _tile_loadd(6, b, TILE_BYTES);
        _tile_loadd(4, a + k, row);
        REPVGG_MULTIPLY(0, 4, 6);
        if (SECOND) {
          _tile_loadd(7, b + panel, TILE_BYTES);
          REPVGG_MULTIPLY(1, 4, 7);
        }
        if (PAIR) {
          _tile_loadd(5, other + k, row);
          REPVGG_MULTIPLY(2, 5, 6);
          if (SECOND) {
            REPVGG_MULTIPLY(3, 5, 7);
          }
        }
      }
    }
}

// Multiplies `rows` pixels of one or two chunks by `panels` panels; stores `width` channels per pixel, `out_row` apart.
template <typename Kind>
void multiply_tiles(int64_t rows, const Chunk<Kind>* chunks, int64_t count, int64_t panels, const Left& left,
                    const typename Kind::Weight* b, int64_t panel, const typename Kind::Ends& ends, int64_t out_row,
                    int64_t width) {
  const bool second = panels > 1;
  TileShape::set(int(rows));
  if (count > 1)
    (second ? add_tiles<Kind, true, true> : add_tiles<Kind, true, false>)(left, chunks[0].from, chunks[1].from, b,
                                                                           panel, ends);
  else
    (second ? add_tiles<Kind, false, true> : add_tiles<Kind, false, false>)(left, chunks[0].from, nullptr, b, panel,
                                                                             ends);
  alignas(64) int32_t sums[4][TILE][LANES];
  _tile_stored(0, sums[0], TILE_BYTES);
  if (second) _tile_stored(1, sums[1], TILE_BYTES);
  if (count > 1) _tile_stored(2, sums[2], TILE_BYTES);
  if (count > 1 && second) _tile_stored(3, sums[3], TILE_BYTES);
  settle();
  for (int64_t v = 0; v < panels; v++) {
    const typename Kind::End end(ends, v * LANES, width - v * LANES);
    for (int64_t chunk = 0; chunk < count; chunk++)
      for (int64_t m = 0; m < rows; m++) end(sums[2 * chunk + v][m], chunks[chunk].to + m * out_row + v * LANES);
  }
}

template <typename Kind, typename At>
void in_tiles(int64_t rows, int64_t columns, const At& at, int64_t panels, const Left& left,
              const typename Kind::Weight* b, int64_t panel, const typename Kind::Ends& ends, int64_t out_row,
              int64_t width) {
  const int64_t parts = (columns + TILE - 1) / TILE, size = (columns + parts - 1) / parts, all = rows * parts;
  for (int64_t i = 0; i < all; i += 2) {
    Chunk<Kind> chunks[2];
    const int64_t count = std::min<int64_t>(2, all - i);
    for (int64_t k = 0; k < count; k++)
      chunks[k] = at((i + k) / parts, std::min((i + k) % parts * size, columns - size));
    multiply_tiles<Kind>(size, chunks, count, panels, left, b, panel, ends, out_row, width);
  }
}

struct TiledHalves {
  using Element = Half;
  using Weight = Half;
  using Out = Half;
  using Ends = FloatEnds;
  using Session = TileShape;
  static constexpr bool TILED = true;
  static constexpr int STEP = 2, RUN = 32;
  // Final operations on a panel's sums, with their operands in registers.
  struct End {
    bool relu;
    __mmask16 stored;
    End(const Ends& ends, int64_t, int64_t count) : relu(ends.relu), stored(first_lanes(count)) {}
    void operator()(const int32_t* sums, Half* out) const { finish(_mm512_load_ps(sums), relu, out, stored); }
  };
};

template <typename Result>
struct TiledBytes {
  using Element = uint8_t;
  using Weight = int8_t;
  using Out = Result;
  using Ends = IntegerEnds;
  using Session = TileShape;
  static constexpr bool TILED = true;
  static constexpr int STEP = 4, RUN = 64;
  struct End {
    __m512 factor;
    __mmask16 stored;
    End(const Ends& ends, int64_t channel, int64_t count)
        : factor(_mm512_loadu_ps(ends.factor + channel)), stored(first_lanes(count)) {}
    void operator()(const int32_t* sums, Result* out) const {
      finish(_mm512_load_si512(sums), factor, out, stored);
    }
  };
};

}  // namespace repvgg
#endif
