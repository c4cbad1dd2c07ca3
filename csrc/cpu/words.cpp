#include "cpu/words.h"

#include <array>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>

#include "cpu/words_bpe.h"

namespace fastlm {
namespace {

constexpr size_t kLongestWord = 192;  // bytes; longer ones are hardly seen twice
constexpr int64_t kPadding = 16;      // bytes that may be read or written past an end
constexpr size_t kFirstSlots = 1 << 12;
constexpr size_t kMostIds = 0xFFFF;

enum ByteClass : uint8_t {
  kLetter = 1,
  kDigit = 2,
  kWhite = 4,      // of ASCII
  kLead = 8,       // of a character that may be white space
  kEndsAny = 16,   // of ASCII, neither letter nor apostrophe
  kEndsMarks = 32  // what ends letters of a tokenizer that takes marks for words
};

constexpr std::array<uint8_t, 256> byte_classes() {
  std::array<uint8_t, 256> is{};
  for (int c = 0; c < 128; ++c) {
    const bool letter = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
    if (letter) is[c] |= kLetter;
    if (c >= '0' && c <= '9') is[c] |= kDigit;
    if ((c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20)) is[c] |= kWhite;
    if (!letter && c != '\'') is[c] |= kEndsAny;
  }
  for (const char c : {' ', '\n', ',', '.', ';', ':', '!', '?', '(', ')', '"', '-'}) is[(int)c] |= kEndsMarks;
  for (const int c : {0xC2, 0xE1, 0xE2, 0xE3}) is[c] |= kLead;
  return is;
}
constexpr std::array<uint8_t, 256> kByte = byte_classes();

inline bool is(char c, int classes) { return kByte[(uint8_t)c] & classes; }

// Bytes of the white-space character at p, Unicode's and Python's; 0 where there is none.
inline int space_at(const char* p) {
  if (!is(*p, kWhite | kLead)) return 0;
  if (is(*p, kWhite)) return 1;
  const auto lead = (uint8_t)p[0], second = (uint8_t)p[1];
  if (lead == 0xC2) return second == 0x85 || second == 0xA0 ? 2 : 0;
  const auto third = (uint8_t)p[2];
  bool found = false;
  if (lead == 0xE1) found = second == 0x9A && third == 0x80;
  if (lead == 0xE3) found = second == 0x80 && third == 0x80;
  if (lead == 0xE2 && second == 0x80) found = third <= 0x8A || third == 0xA8 || third == 0xA9 || third == 0xAF;
  if (lead == 0xE2 && second == 0x81) found = third == 0x9F;
  return found ? 3 : 0;
}

template <Cut cut>
inline bool ends_word(const char* p) {
  if constexpr (cut == Cut::kAtSpaces) return *p == ' ';
  if (*p == ' ' || *p == '\t') return true;
  if (*p != '\r' && *p != '\n') return false;
  return cut != Cut::kNotLines || is(p[-1], kLetter | kDigit);
}

template <Cut cut>
const char* end_of_word(const char* word, const char* end) {
  const char* p = word;
  if constexpr (cut != Cut::kAtSpaces) {
    if (*p == ' ') ++p;
    const char* const letters = p;
    while (p < end && is(*p, kLetter)) ++p;
    if (p > letters && p < end && is(*p, cut == Cut::kAtMarks ? kEndsMarks : kEndsAny)) return p;
    p = word;
  }
  for (;;) {
    for (int size; p < end && (size = space_at(p));) p += size;
    while (p < end && !space_at(p)) ++p;
    if (p == end || ends_word<cut>(p)) return p;
  }
}

uint64_t mixed(uint64_t a, uint64_t b) {
  const auto product = (unsigned __int128)a * b;
  return (uint64_t)product ^ (uint64_t)(product >> 64);
}

template <class T>
uint64_t loaded(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// `texts` by several threads, each by one; the first exception of one is thrown here.
template <class Work>
void parallel(size_t count, int threads, const Work& work) {
  std::atomic<size_t> next{0};
  std::exception_ptr failure;
  std::mutex failed;
  const auto run = [&] {
    try {
      for (size_t i; (i = next++) < count;) work(i);
    } catch (...) {
      const std::lock_guard lock(failed);
      failure = std::current_exception();
      next = count;
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads && (size_t)i < count; ++i) {
    try {
      others.emplace_back(run);
    } catch (const std::system_error&) {  // no more threads to be had: those that are there do the work
      break;
    }
  }
  run();
  for (std::thread& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

const char* word_end(Cut cut, const char* word, const char* end) {
  switch (cut) {
    case Cut::kAfterLetters: return end_of_word<Cut::kAfterLetters>(word, end);
    case Cut::kNotLines: return end_of_word<Cut::kNotLines>(word, end);
    case Cut::kAtMarks: return end_of_word<Cut::kAtMarks>(word, end);
    case Cut::kAtSpaces: return end_of_word<Cut::kAtSpaces>(word, end);
  }
  return end;
}

WordTable::WordTable(int id_bytes) : id_bytes_(id_bytes) {
  std::random_device random;
  seed_ = (uint64_t)random() << 32 | random();  // so that no text can be made whose words collide
  clear();
}

void WordTable::clear() {
  slots_ = std::vector<Slot>(kFirstSlots);
  bytes_ = std::vector<char>(kPadding);
  used_ = 0;
}

uint64_t WordTable::hash(std::string_view word) const {
  const char* p = word.data();
  size_t n = word.size();
  uint64_t sum = seed_ ^ n * 0x9E3779B97F4A7C15u;
  for (; n > 16; n -= 16, p += 16)
    sum = mixed(loaded<uint64_t>(p) ^ sum, loaded<uint64_t>(p + 8) ^ 0xA0761D6478BD642Fu);
  uint64_t first, last;
  if (n >= 8) {
    first = loaded<uint64_t>(p), last = loaded<uint64_t>(p + n - 8);
  } else if (n >= 4) {
    first = loaded<uint32_t>(p), last = loaded<uint32_t>(p + n - 4);
  } else {
    first = (uint8_t)p[0], last = (uint64_t)(uint8_t)p[n / 2] << 8 | (uint8_t)p[n - 1];
  }
  return mixed(mixed(first ^ sum, last ^ 0xE7037ED1A0B428DBu), seed_ | 1);
}

const WordTable::Slot* WordTable::find(std::string_view word, uint64_t hash) const {
  for (uint64_t i = hash;; ++i) {
    const Slot& slot = slots_[i & (slots_.size() - 1)];
    if (slot.size == 0) return nullptr;
    if (slot.hash == hash && slot.size == word.size() &&
        std::memcmp(bytes_.data() + slot.at, word.data(), word.size()) == 0)
      return &slot;
  }
}

void WordTable::insert(std::string_view word, const char* ids, int64_t count) {
  const size_t at = bytes_.size() - kPadding, size = word.size() + count * id_bytes_;
  const uint64_t found = hash(word);
  if (word.empty() || word.size() > kLongestWord || count > (int64_t)kMostIds || at + size > UINT32_MAX ||
      find(word, found))
    return;
  if (3 * (used_ + 1) > 2 * (int64_t)slots_.size()) grow();
  bytes_.resize(bytes_.size() + size);
  std::memcpy(bytes_.data() + at, word.data(), word.size());
  std::memcpy(bytes_.data() + at + word.size(), ids, count * id_bytes_);
  uint64_t i = found;
  while (slots_[i & (slots_.size() - 1)].size) ++i;
  slots_[i & (slots_.size() - 1)] = {found, (uint32_t)at, (uint16_t)word.size(), (uint16_t)count};
  ++used_;
}

void WordTable::grow() {
  std::vector<Slot> wider(2 * slots_.size());
  for (const Slot& slot : slots_) {
    if (!slot.size) continue;
    uint64_t i = slot.hash;
    while (wider[i & (wider.size() - 1)].size) ++i;
    wider[i & (wider.size() - 1)] = slot;
  }
  slots_.swap(wider);
}

// A word that was encoded here, to be remembered: its ids are `count` of those of its text, from byte `at` on.
struct Words::Fresh {
  std::string_view word;
  int64_t at, count;
};

Words::Words(Cut cut, int id_bytes, int64_t most_bytes, std::unique_ptr<const WordBpe> bpe)
    : cut_(cut), id_bytes_(id_bytes), most_bytes_(most_bytes), bpe_(std::move(bpe)), table_(id_bytes) {}

Words::~Words() = default;

template <Cut cut>
void Words::encode(std::string_view text, Encoded& out, std::vector<Fresh>& fresh) const {
  std::string& ids = out.ids;
  int64_t used = 0;
  ids.resize(text.size() / 2 + kPadding);
  const auto room = [&](int64_t more) {
    if (used + more + kPadding > (int64_t)ids.size()) ids.resize(2 * (used + more + kPadding));
    return ids.data() + used;
  };
  std::vector<int32_t> made;
  const char* const end = text.data() + text.size();
  for (const char* p = text.data(); p < end;) {
    const char* const next = end_of_word<cut>(p, end);
    const std::string_view word(p, next - p);
    p = next;
    if (word.size() <= kLongestWord) {
      if (const auto* slot = table_.find(word, table_.hash(word))) {
        const int64_t size = (int64_t)slot->count * id_bytes_;
        char* const to = room(size);
        if (size <= kPadding)
          std::memcpy(to, table_.ids(*slot), kPadding);  // of a fixed size: no call
        else
          std::memcpy(to, table_.ids(*slot), size);
        used += size;
        continue;
      }
    }
    made.clear();
    if (!bpe_ || !bpe_->encode(word, made)) {
      out.holes.push_back({used, word, 0});
      continue;
    }
    char* const to = room((int64_t)made.size() * id_bytes_);
    for (size_t i = 0; i < made.size(); ++i) {
      if (id_bytes_ == 2)
        reinterpret_cast<uint16_t*>(to)[i] = (uint16_t)made[i];
      else
        reinterpret_cast<int32_t*>(to)[i] = made[i];
    }
    if (word.size() <= kLongestWord) fresh.push_back({word, used, (int64_t)made.size()});
    used += (int64_t)made.size() * id_bytes_;
  }
  ids.resize(used);
}

void Words::encode(std::string_view text, Encoded& out, std::vector<Fresh>& fresh) const {
  switch (cut_) {
    case Cut::kAfterLetters: return encode<Cut::kAfterLetters>(text, out, fresh);
    case Cut::kNotLines: return encode<Cut::kNotLines>(text, out, fresh);
    case Cut::kAtMarks: return encode<Cut::kAtMarks>(text, out, fresh);
    case Cut::kAtSpaces: return encode<Cut::kAtSpaces>(text, out, fresh);
  }
}

Words::Found Words::find(const std::vector<std::string_view>& texts, int threads) {
  Found found;
  found.texts.resize(texts.size());
  std::vector<std::vector<Fresh>> fresh(texts.size());
  {
    const std::shared_lock lock(mutex_);
    parallel(texts.size(), threads, [&](size_t i) { encode(texts[i], found.texts[i], fresh[i]); });
  }
  std::unordered_map<std::string_view, int64_t> seen;
  for (Encoded& text : found.texts) {
    for (Hole& hole : text.holes) {
      const auto [at, first] = seen.try_emplace(hole.word, (int64_t)found.unknown.size());
      if (first) found.unknown.push_back(hole.word);
      hole.unknown = at->second;
    }
  }
  const std::unique_lock lock(mutex_);
  if (table_.bytes() > most_bytes_) table_.clear();
  for (size_t i = 0; i < texts.size(); ++i)
    for (const Fresh& one : fresh[i]) table_.insert(one.word, found.texts[i].ids.data() + one.at, one.count);
  return found;
}

void Words::fill(Found& found, const std::vector<std::string_view>& ids) {
  for (Encoded& text : found.texts) {
    if (text.holes.empty()) continue;
    int64_t size = (int64_t)text.ids.size();
    for (const Hole& hole : text.holes) size += (int64_t)ids[hole.unknown].size();
    std::string filled;
    filled.reserve(size);
    int64_t from = 0;
    for (const Hole& hole : text.holes) {
      filled.append(text.ids, from, hole.at - from).append(ids[hole.unknown]);
      from = hole.at;
    }
    filled.append(text.ids, from, std::string::npos);
    text.ids.swap(filled);
    text.holes.clear();
  }
  const std::unique_lock lock(mutex_);
  for (size_t i = 0; i < ids.size(); ++i)
    table_.insert(found.unknown[i], ids[i].data(), (int64_t)ids[i].size() / id_bytes_);
}

int64_t Words::bytes() {
  const std::shared_lock lock(mutex_);
  return table_.bytes();
}

int64_t Words::size() {
  const std::shared_lock lock(mutex_);
  return table_.size();
}

}  // namespace fastlm
