/* CRC-32C (Castagnoli, reflected polynomial 0x82f63b78; RFC 3720, B.4), by the processor where it can. */
#include "core.h"

static uint32_t table[256];

static void make_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++)
            value = value & 1 ? value >> 1 ^ 0x82f63b78u : value >> 1;
        table[i] = value;
    }
}

static uint32_t by_table(const uint8_t *p, size_t n, uint32_t crc)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_table);
    while (n--)
        crc = crc >> 8 ^ table[(crc ^ *p++) & 0xff];
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t by_sse42(const uint8_t *p, size_t n, uint32_t crc)
{
    uint64_t wide = crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        wide = __builtin_ia32_crc32di(wide, word);
    }
    crc = (uint32_t)wide;
    while (n--)
        crc = __builtin_ia32_crc32qi(crc, *p++);
    return crc;
}

static uint64_t word(const uint8_t *p)
{
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

/* The instruction takes three cycles and one can begin in each: four pages side by side keep it busy. */
__attribute__((target("sse4.2"))) static void four_by_sse42(const uint8_t *p, uint32_t *sums)
{
    uint64_t a = ~0u, b = ~0u, c = ~0u, d = ~0u;
    for (size_t at = 0; at < TB_PAGE_BYTES; at += 8) {
        a = __builtin_ia32_crc32di(a, word(p + at));
        b = __builtin_ia32_crc32di(b, word(p + TB_PAGE_BYTES + at));
        c = __builtin_ia32_crc32di(c, word(p + 2 * TB_PAGE_BYTES + at));
        d = __builtin_ia32_crc32di(d, word(p + 3 * TB_PAGE_BYTES + at));
    }
    sums[0] = ~(uint32_t)a;
    sums[1] = ~(uint32_t)b;
    sums[2] = ~(uint32_t)c;
    sums[3] = ~(uint32_t)d;
}
#endif

/* Continues from `crc`, 0 at the start. Any thread. */
uint32_t tb_crc32c(const void *data, size_t length, uint32_t crc)
{
    crc = ~crc;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("sse4.2"))
        return ~by_sse42(data, length, crc);
#endif
    return ~by_table(data, length, crc);
}

/* The checksums of the pages of a block that `pages` names, each by itself, into their places in sums[16].
 * Any thread. */
void tb_crc32c_pages(const uint8_t *block, uint16_t pages, uint32_t *sums)
{
    for (unsigned page = 0; page < TB_BLOCK_PAGES; page++) {
        if (!(pages >> page & 1))
            continue;
#if defined(__x86_64__)
        if ((pages >> page & 15) == 15 && __builtin_cpu_supports("sse4.2")) {
            four_by_sse42(block + page * TB_PAGE_BYTES, sums + page);
            page += 3;
            continue;
        }
#endif
        sums[page] = tb_crc32c(block + page * TB_PAGE_BYTES, TB_PAGE_BYTES, 0);
    }
}
