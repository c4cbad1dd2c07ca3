// Texts as words whose tokens were found before: cut, looked up in a table, and those of a byte-level BPE encoded here.
// fastlm/data/word_cache.py says the same in Python, and why the tokens of the words, joined, are those of the text.
#pragma once

#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <vector>

namespace fastlm {

class WordBpe;

// Where words end, from what cuts most to what cuts least; the order of word_cache.py's patterns.
enum class Cut { kAfterLetters, kNotLines, kAtMarks, kAtSpaces };

// The end of the word that begins at `word`, not an empty text; of valid UTF-8.
const char* word_end(Cut cut, const char* word, const char* end);

// The ids of known words by their bytes: open addressing, the bytes compared wherever the hash is that of another.
class WordTable {
 public:
  // What lies in memory for one word: at `at` its `size` bytes, then `count` ids.
  struct Slot {
    uint64_t hash;
    uint32_t at;
    uint16_t size, count;  // a size of 0: the slot is free
  };

  explicit WordTable(int id_bytes);
  void clear();
  uint64_t hash(std::string_view word) const;
  const Slot* find(std::string_view word, uint64_t hash) const;
  const char* ids(const Slot& slot) const { return bytes_.data() + slot.at + slot.size; }
  void insert(std::string_view word, const char* ids, int64_t count);
  int64_t bytes() const { return (int64_t)(bytes_.size() + slots_.size() * sizeof(Slot)); }
  int64_t size() const { return used_; }

 private:
  void grow();

  int id_bytes_;
  uint64_t seed_;
  int64_t used_ = 0;
  std::vector<Slot> slots_;  // a power of two
  std::vector<char> bytes_;  // kPadding more than are used
};

// Encodes texts with what it has learned, and says which words it lacks. Any thread may call; calls that only look
// words up run side by side.
class Words {
 public:
  // A word whose ids are not known yet: they belong at byte `at` of the ids of its text.
  struct Hole {
    int64_t at;
    std::string_view word;
    int64_t unknown;  // which of Found::unknown
  };
  struct Encoded {
    std::string ids;  // of id_bytes each
    std::vector<Hole> holes;
  };
  struct Found {
    std::vector<Encoded> texts;
    std::vector<std::string_view> unknown;  // each once, in order
  };

  // id_bytes: 2 or 4. most_bytes: of the table, about, past which it begins anew. bpe: may be null.
  Words(Cut cut, int id_bytes, int64_t most_bytes, std::unique_ptr<const WordBpe> bpe);
  ~Words();
  // The views are of `texts`, which are valid UTF-8.
  Found find(const std::vector<std::string_view>& texts, int threads);
  // The ids of each text of `found` whose unknown words have these ids, which are remembered.
  void fill(Found& found, const std::vector<std::string_view>& ids);
  const char* end_of(const char* word, const char* end) const { return word_end(cut_, word, end); }
  int64_t bytes();
  int64_t size();

 private:
  struct Fresh;
  template <Cut cut>
  void encode(std::string_view text, Encoded& out, std::vector<Fresh>& fresh) const;
  void encode(std::string_view text, Encoded& out, std::vector<Fresh>& fresh) const;

  const Cut cut_;
  const int id_bytes_;
  const int64_t most_bytes_;
  const std::unique_ptr<const WordBpe> bpe_;
  std::shared_mutex mutex_;
  WordTable table_;
};

}  // namespace fastlm
