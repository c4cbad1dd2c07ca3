// A byte-level BPE for words: the cuts of its regular expression, then its merges. Ids equal the tokenizers library's.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace fastlm {

// What a character is to the tokenizers library's regular expressions; kUpper: [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], kLower:
// [\p{Ll}\p{Lm}\p{Lo}\p{M}].
enum CharacterClass : uint8_t {
  kLetter = 1,
  kNumber = 2,
  kSpace = 4,
  kMark = 8,
  kKnown = 16,
  kUpper = 32,
  kLower = 64
};

// Alternatives of a regular expression that cuts words, by fastlm/data/word_bpe.py's names for them.
enum class Piece {
  kSuffix,            // 's 't 're 've 'm 'll 'd
  kSuffixAnyCase,     // (?i:'s|'t|'re|'ve|'m|'ll|'d)
  kLetters,           // " ?\p{L}+"
  kNumbers,           // " ?\p{N}+"
  kOthers,            // " ?[^\s\p{L}\p{N}]+"
  kOthersLines,       // " ?[^\s\p{L}\p{N}]+[\r\n]*"
  kOthersLinesSlash,  // " ?[^\s\p{L}\p{N}]+[\r\n/]*"
  kAnyLetters,        // "[^\r\n\p{L}\p{N}]?\p{L}+"
  kNumber,            // "\p{N}"
  kNumbersUpTo3,      // "\p{N}{1,3}"
  kNumbersAlone,      // "\p{N}+"
  kLines,             // "\s*[\r\n]+" or "\s*[\r\n]"
  kSpacesNotLast,     // "\s+(?!\S)"
  kSpaces,            // "\s+"
  kUpperLower,        // "[^\r\n\p{L}\p{N}]?" kUpper* kLower+, then kSuffixAnyCase or nothing
  kUpperOnly,         // "[^\r\n\p{L}\p{N}]?" kUpper+ kLower*, then kSuffixAnyCase or nothing
};

class WordBpe {
 public:
  struct Merge {
    int32_t left, right, made;
  };

  // pieces: in the order of the expression. classes: of the characters from 0 on; others are left to the library.
  // byte_ids: of the 256 bytes. merges: by rank. whole: tokens that are taken before any merge, of ignore_merges.
  WordBpe(std::vector<Piece> pieces, std::string classes, std::vector<int32_t> byte_ids,
          const std::vector<Merge>& merges, std::unordered_map<std::string, int32_t> whole);
  // Appends the ids of a word, or appends nothing and returns false where it cannot vouch for them.
  bool encode(std::string_view word, std::vector<int32_t>& ids) const;

 private:
  struct Pair {
    uint64_t key;
    int32_t rank, made;  // a rank of kNever: the place is free
  };

  const Pair* find(int32_t left, int32_t right) const;
  void merge(std::string_view piece, std::vector<int32_t>& ids) const;

  std::vector<Piece> pieces_;
  std::string classes_;
  std::vector<int32_t> byte_ids_;
  std::vector<Pair> pairs_;  // a power of two of them
  std::unordered_map<std::string, int32_t> whole_;
};

}  // namespace fastlm
