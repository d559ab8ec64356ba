// How rows of a tower are shared out. For bodies of for_each_road.h, behind tiles_simd.h.

constexpr int64_t kMostTilesAtOnce = 6;   // of rows: with what is worked out between they must fit the second cache
constexpr int64_t kQueries = 12 * kTile;  // that share one packing of keys and values

// Parts of so many tiles of rows that are nearly equal, some for each thread.
class Parts {
   public:
    Parts(int64_t n_tiles, int n_threads)
        : n_tiles_(n_tiles),
          n_parts_(std::min<int64_t>(n_tiles, std::max<int64_t>(2 * n_threads, up_to(n_tiles, kMostTilesAtOnce) / kMostTilesAtOnce))) {}

    int64_t most_rows() const { return (n_tiles_ + n_parts_ - 1) / n_parts_ * kTile; }

    // Calls work(first tile, tiles, who) for each.
    template <class Work>
    void each(Crew& crew, const Work& work) const {
        crew.each(n_parts_, [&](int64_t part, int who) MR_TARGET {
            const int64_t first = part * n_tiles_ / n_parts_, end = (part + 1) * n_tiles_ / n_parts_;
            configure();
            work(first, end - first, who);
            release();
        });
    }

   private:
    int64_t n_tiles_, n_parts_;
};
