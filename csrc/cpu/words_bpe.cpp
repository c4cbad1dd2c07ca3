#include "cpu/words_bpe.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace fastlm {
namespace {

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();
constexpr size_t kLongestPiece = 256;  // bytes; merging takes the square of them

struct Character {
  uint32_t at;  // in the word's bytes
  uint8_t is;   // CharacterClass
  char ascii;   // 0 where the character is none
};

// A word's characters, with one at the end that is of no class.
class Characters {
 public:
  // False where a character's class is not known.
  bool decode(std::string_view word, const std::string& classes) {
    found_.clear();
    for (size_t i = 0; i < word.size();) {
      const auto lead = (uint8_t)word[i];
      const int size = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
      if (i + size > word.size()) return false;
      uint32_t code = size == 1 ? lead : lead & (0xFF >> (size + 1));
      for (int k = 1; k < size; ++k) code = code << 6 | ((uint8_t)word[i + k] & 0x3F);
      if (code >= classes.size() || !(classes[code] & kKnown)) return false;
      found_.push_back({(uint32_t)i, (uint8_t)classes[code], code < 0x80 ? (char)code : '\0'});
      i += size;
    }
    found_.push_back({(uint32_t)word.size(), 0, '\0'});
    return true;
  }

  size_t size() const { return found_.size() - 1; }
  uint32_t at(size_t i) const { return found_[i].at; }
  char ascii(size_t i) const { return found_[i].ascii; }
  bool is(size_t i, int classes) const { return found_[i].is & classes; }
  bool is_space(size_t i) const { return is(i, kSpace); }
  bool is_line_end(size_t i) const { return ascii(i) == '\n' || ascii(i) == '\r'; }
  bool is_other(size_t i) const { return i < size() && !is(i, kSpace | kLetter | kNumber); }
  // [^\r\n\p{L}\p{N}]
  bool is_before_letters(size_t i) const { return i < size() && !is(i, kLetter | kNumber) && !is_line_end(i); }

  // The end of the run of these classes from i on.
  size_t run(size_t i, int classes) const {
    while (is(i, classes)) ++i;
    return i;
  }

 private:
  std::vector<Character> found_;
};

// The end of 's, 't, 're, 've, 'm, 'll or 'd at i, or i.
size_t suffix(const Characters& c, size_t i, bool any_case) {
  if (c.ascii(i) != '\'') return i;
  const auto letter = [&](size_t k) { return any_case ? (char)(c.ascii(k) | 0x20) : c.ascii(k); };
  const char first = letter(i + 1);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return i + 2;
  const char second = first == '\0' || i + 2 > c.size() ? '\0' : letter(i + 2);
  if ((first == 'r' || first == 'v') && second == 'e') return i + 3;
  return first == 'l' && second == 'l' ? i + 3 : i;
}

// kUpper* kLower+ from i on: its end, or i. The greedy first part gives back until the second has a character.
size_t upper_lower(const Characters& c, size_t i) {
  const size_t upper = c.run(i, kUpper);
  for (size_t from = upper + 1; from-- > i;) {
    if (c.is(from, kLower)) return c.run(from, kLower);
  }
  return i;
}

size_t upper_only(const Characters& c, size_t i) {
  const size_t upper = c.run(i, kUpper);
  return upper == i ? i : c.run(upper, kLower);
}

// Two words' parts with what may stand before them, and what may follow.
template <size_t (*Word)(const Characters&, size_t)>
size_t cased(const Characters& c, size_t i) {
  size_t end = i;
  if (c.is_before_letters(i)) {
    end = Word(c, i + 1);
    if (end == i + 1) end = i;
  }
  if (end == i) end = Word(c, i);
  return end == i ? i : suffix(c, end, true);
}

size_t others(const Characters& c, size_t i) {
  size_t end = i + (c.ascii(i) == ' ');
  if (!c.is_other(end)) return i;
  while (c.is_other(end)) ++end;
  return end;
}

size_t after_blank(const Characters& c, size_t i, int classes) {
  const size_t begin = i + (c.ascii(i) == ' ');
  const size_t end = c.run(begin, classes);
  return end == begin ? i : end;
}

size_t lines(const Characters& c, size_t i) {
  for (size_t end = c.run(i, kSpace); end > i; --end) {
    if (c.is_line_end(end - 1)) return end;
  }
  return i;
}

// The end of the match of one alternative at i, or i where it does not match.
size_t match(Piece piece, const Characters& c, size_t i) {
  size_t end = i;
  switch (piece) {
    case Piece::kSuffix: return suffix(c, i, false);
    case Piece::kSuffixAnyCase: return suffix(c, i, true);
    case Piece::kLetters: return after_blank(c, i, kLetter);
    case Piece::kNumbers: return after_blank(c, i, kNumber);
    case Piece::kOthers: return others(c, i);
    case Piece::kOthersLines:
    case Piece::kOthersLinesSlash:
      end = others(c, i);
      if (end > i)
        while (c.is_line_end(end) || (piece == Piece::kOthersLinesSlash && c.ascii(end) == '/')) ++end;
      return end;
    case Piece::kAnyLetters:
      end = c.run(i + c.is_before_letters(i), kLetter);
      return end == i + c.is_before_letters(i) ? i : end;
    case Piece::kNumber: return i + c.is(i, kNumber);
    case Piece::kNumbersUpTo3: return std::min(c.run(i, kNumber), i + 3);
    case Piece::kNumbersAlone: return c.run(i, kNumber);
    case Piece::kLines: return lines(c, i);
    case Piece::kSpacesNotLast: end = c.run(i, kSpace); return end == c.size() || end == i ? end : end - 1;
    case Piece::kSpaces: return c.run(i, kSpace);
    case Piece::kUpperLower: return cased<upper_lower>(c, i);
    case Piece::kUpperOnly: return cased<upper_only>(c, i);
  }
  return i;
}

uint64_t pair_key(int32_t left, int32_t right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }
uint64_t place(uint64_t key) {
  key *= 0x9E3779B97F4A7C15u;
  return key ^ key >> 29;
}

}  // namespace

WordBpe::WordBpe(std::vector<Piece> pieces, std::string classes, std::vector<int32_t> byte_ids,
                 const std::vector<Merge>& merges, std::unordered_map<std::string, int32_t> whole)
    : pieces_(std::move(pieces)), classes_(std::move(classes)), byte_ids_(std::move(byte_ids)),
      whole_(std::move(whole)) {
  size_t room = 16;
  while (room < 2 * merges.size()) room *= 2;
  pairs_.assign(room, {0, kNever, 0});
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const uint64_t key = pair_key(merges[rank].left, merges[rank].right);
    uint64_t i = place(key);
    while (pairs_[i & (room - 1)].rank != kNever && pairs_[i & (room - 1)].key != key) ++i;
    pairs_[i & (room - 1)] = {key, (int32_t)rank, merges[rank].made};  // of a pair given twice, the last
  }
}

const WordBpe::Pair* WordBpe::find(int32_t left, int32_t right) const {
  const uint64_t key = pair_key(left, right);
  for (uint64_t i = place(key);; ++i) {
    const Pair& pair = pairs_[i & (pairs_.size() - 1)];
    if (pair.rank == kNever || pair.key == key) return &pair;
  }
}

void WordBpe::merge(std::string_view piece, std::vector<int32_t>& ids) const {
  if (!whole_.empty()) {
    const auto found = whole_.find(std::string(piece));
    if (found != whole_.end()) return ids.push_back(found->second);
  }
  int32_t symbol[kLongestPiece + 1];
  const Pair* next[kLongestPiece + 1];  // what symbols i and i + 1 make
  int n = (int)piece.size();
  for (int i = 0; i < n; ++i) symbol[i] = byte_ids_[(uint8_t)piece[i]];
  for (int i = 0; i + 1 < n; ++i) next[i] = find(symbol[i], symbol[i + 1]);
  while (n > 1) {
    int best = 0;
    for (int i = 1; i + 1 < n; ++i)
      if (next[i]->rank < next[best]->rank) best = i;
    if (next[best]->rank == kNever) break;
    symbol[best] = next[best]->made;
    --n;
    std::memmove(symbol + best + 1, symbol + best + 2, (n - best - 1) * sizeof *symbol);
    if (best + 1 < n) {
      std::memmove(next + best + 1, next + best + 2, (n - best - 2) * sizeof *next);
      next[best] = find(symbol[best], symbol[best + 1]);
    }
    if (best > 0) next[best - 1] = find(symbol[best - 1], symbol[best]);
  }
  ids.insert(ids.end(), symbol, symbol + n);
}

bool WordBpe::encode(std::string_view word, std::vector<int32_t>& ids) const {
  thread_local Characters characters;
  if (!characters.decode(word, classes_)) return false;
  const size_t before = ids.size();
  for (size_t i = 0; i < characters.size();) {
    size_t end = i;
    for (size_t k = 0; k < pieces_.size() && end == i; ++k) end = match(pieces_[k], characters, i);
    const uint32_t at = characters.at(i), size = characters.at(end) - at;
    if (size == 0 || size > kLongestPiece) {
      ids.resize(before);
      return false;
    }
    merge(word.substr(at, size), ids);
    i = end;
  }
  return true;
}

}  // namespace fastlm
