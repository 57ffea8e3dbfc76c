/* A faster entropy decoder for libjpeg-turbo, which spends more than half of its time there: for baseline
   Huffman in one scan without restart markers, which is what nearly all photographs are. With it a crop of an
   ImageNet photograph takes 0.80 of the time.

   One look at the next 11 bits gives up to two whole coefficients (zeros before, length, value), where libjpeg
   looks twice for one. The stuffed zeros are taken out beforehand, so that bits are refilled without a branch.
   Of all else libjpeg takes care: markers, tables, skipping, the DCT. Damage ends as it does in libjpeg. */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines"
#endif

/* The head of libjpeg's private `struct jpeg_entropy_decoder`, whose second function we replace: the same from
   libjpeg 6b (1998) to libjpeg-turbo 3.2 (2026). Of later versions nothing is assumed: libjpeg does it all. */
#define KNOWN (LIBJPEG_TURBO_VERSION_NUMBER < 3003000)
struct entropy_head {
    void (*start_pass)(j_decompress_ptr);
    boolean (*decode_mcu)(j_decompress_ptr, JBLOCKROW *);
};

/* LOOK: bits looked up at once (10 and 12 are slower). END: more zeros than a block has. PAD: more bytes than
   the longest MCU, 10 blocks of 64 coefficients of at most 31 bits, and one refill. */
enum { LOOK = 11, END = 64, PAD = 10 * 64 * 4 + 8 };

/* The coefficient that LOOK bits begin with: `value` after `zeros`, in `length` bits, its code included. If its
   code is as short but its value does not fit, `length` is 0, `value` the code's length and `zeros` the symbol;
   if the code itself is longer, all are 0. */
struct look {
    int16_t value;
    uint8_t zeros, length;
};

/* Two coefficients: `first` after `zeros`, `second` `step` places later, and the next one at least `advance`
   places after that. One alone is stored twice. `zeros` is END if there is not even one. */
struct two {
    int16_t first, second;
    uint8_t zeros, step, advance, length;
};

struct codes {
    struct look look[1 << LOOK];
    int beyond[18]; /* the first 16 bits of every code of n bits are less */
    int offset[17]; /* from a code of n bits to the place of its symbol */
    uint8_t symbols[256];
};

struct scan {
    const uint8_t *next, *end; /* where to refill from, and where the data ends */
    uint64_t bits;             /* left-aligned */
    int have;                  /* how many of them count */
    int over;                  /* the data ended: what follows stays grey */
    int cut_off;               /* it ends without a marker */
    unsigned last_dc[4];
    struct codes dc[2], ac[2];
    struct two two[2][1 << LOOK];
    uint8_t data[]; /* unstuffed, then PAD zeros */
};

/* A coefficient's value from its `size` bits (T.81, F.2.2.1). */
static inline int extended(unsigned bits, int size) {
    return size && bits < 1u << (size - 1) ? (int)bits - (1 << size) + 1 : (int)bits;
}

static int is_end(int symbol, int is_dc) { return !is_dc && symbol % 16 == 0 && symbol != 0xF0; }

/* 0 if the table is none of baseline's; libjpeg then says what is wrong. */
static int make_codes(struct codes *codes, const JHUFF_TBL *table, int is_dc) {
    int code = 0, place = 0;
    if (!table) return 0;
    memcpy(codes->symbols, table->huffval, sizeof codes->symbols);
    for (int n = 1; n <= 16; n++, code <<= 1) {
        codes->offset[n] = place - code;
        for (int i = 0; i < table->bits[n]; i++, place++, code++) {
            if (code >= 1 << n || place >= 256) return 0;
            int symbol = table->huffval[place], size = symbol % 16;
            if (is_dc && symbol > 15) return 0;
            if (n > LOOK) continue;
            struct look *look = codes->look + ((size_t)code << (LOOK - n));
            for (int rest = 0; rest < 1 << (LOOK - n); rest++) {
                if (n + size > LOOK)
                    look[rest] = (struct look){n, symbol, 0};
                else if (is_end(symbol, is_dc))
                    look[rest] = (struct look){0, END, n};
                else
                    look[rest] =
                        (struct look){extended(rest >> (LOOK - n - size), size), symbol / 16, n + size};
            }
        }
        codes->beyond[n] = code << (16 - n);
    }
    codes->beyond[17] = 1 << 17;
    return 1;
}

static void make_twos(struct two *twos, const struct look *look) {
    for (int i = 0; i < 1 << LOOK; i++) {
        struct look a = look[i], b = look[(i << a.length) % (1 << LOOK)];
        struct two two = {a.value, a.value, a.length ? a.zeros : END, 0, 1, a.length};
        if (a.length && b.length && a.length + b.length <= LOOK) {
            two.length += b.length;
            if (b.zeros == END)
                two.advance = END;
            else
                two.second = b.value, two.step = b.zeros + 1;
        }
        twos[i] = two;
    }
}

/* The coefficient that left-aligned `bits` begin with, where LOOK bits do not hold it. */
static __attribute__((noinline)) struct look look_further(const struct codes *codes, struct look look,
                                                          uint64_t bits, int is_dc) {
    int n = look.value, symbol = look.zeros;
    if (n == 0) {
        int code = (int)(bits >> 48);
        for (n = LOOK + 1; code >= codes->beyond[n]; n++) continue;
        if (n > 16) /* no such code: libjpeg warns and goes on with a 0 */
            n = 16, symbol = 0;
        else
            symbol = codes->symbols[((code >> (16 - n)) + codes->offset[n]) & 255];
    }
    if (is_end(symbol, is_dc)) return (struct look){0, END, n};
    int size = symbol % 16;
    int value = size ? extended((unsigned)(bits << n >> (64 - size)), size) : 0;
    return (struct look){value, symbol / 16, n + size};
}

/* From zigzag order. Damaged data may take a step of 16 from the last place but one. */
static const uint8_t natural[64 + 16] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33,  //
    40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36,  //
    29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,  //
    47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

static struct scan *scan_of(j_decompress_ptr jpeg);

/* The reader's state is in variables of the function below, so that it stays in registers. */
#define REFILL /* to 56 bits or more */                      \
    do {                                                     \
        uint64_t word;                                       \
        memcpy(&word, next, 8);                              \
        bits |= __builtin_bswap64(word) >> have;             \
        next += (63 - have) >> 3;                            \
        have |= 56;                                          \
    } while (0)
#define TAKE(n) bits <<= (n), have -= (n)
#define LOOK_ONCE(look, codes, is_dc)                                            \
    do {                                                                         \
        look = (codes)->look[bits >> (64 - LOOK)];                               \
        if (look.length == 0) look = look_further(codes, look, bits, is_dc);     \
        TAKE(look.length);                                                       \
    } while (0)

/* See libjpeg's jdhuff.c: the coefficients of one MCU into zeroed blocks, or nowhere if `mcu` is NULL. */
static boolean decode_mcu(j_decompress_ptr jpeg, JBLOCKROW *mcu) {
    struct scan *scan = scan_of(jpeg);
    if (scan->over) return TRUE;
    const uint8_t *next = scan->next;
    uint64_t bits = scan->bits;
    int have = scan->have;
    JBLOCK nowhere;
    for (int b = 0; b < jpeg->blocks_in_MCU; b++) {
        int c = jpeg->MCU_membership[b];
        const jpeg_component_info *component = jpeg->cur_comp_info[c];
        const struct codes *ac = &scan->ac[component->ac_tbl_no];
        const struct two *twos = scan->two[component->ac_tbl_no];
        JCOEF *block = mcu ? mcu[b][0] : nowhere;
        struct look look;
        REFILL;
        LOOK_ONCE(look, &scan->dc[component->dc_tbl_no], 1);
        block[0] = (JCOEF)(scan->last_dc[c] += look.value);
        int k = 1;
        while (k < 64) {
            REFILL;
#pragma GCC unroll 3 /* what is left of 56 bits after two looks is enough for the longest coefficient */
            for (int i = 0; i < 3; i++) {
                struct two two = twos[bits >> (64 - LOOK)];
                if (k + two.zeros > 62) { /* the block's last (what follows is the next one's), or a long one */
                    if (k > 63) break;
                    LOOK_ONCE(look, ac, 0);
                    k += look.zeros;
                    if (k < 64) block[natural[k]] = look.value;
                    k++;
                    break;
                }
                TAKE(two.length);
                k += two.zeros;
                block[natural[k]] = two.first;
                k += two.step;
                block[natural[k]] = two.second;
                k += two.advance;
            }
        }
    }
    scan->next = next;
    scan->bits = bits;
    scan->have = have;
    if ((next - scan->end) * 8 > have) {
        scan->over = 1;
        if (scan->cut_off) WARNMS(jpeg, JWRN_JPEG_EOF);
    }
    return TRUE;
}

/* The scan's bytes up to its marker, without the zeros that follow each byte of 255. */
static void unstuff(struct scan *scan, const uint8_t *from, const uint8_t *end) {
    uint8_t *to = scan->data;
    int marker = 0;
    while (from < end && !marker) {
        const uint8_t *ff = memchr(from, 0xFF, end - from);
        size_t n = (ff ? ff + 1 : end) - from;
        memcpy(to, from, n);
        to += n;
        from += n;
        if (ff && from < end) marker = *from++ != 0;
    }
    scan->next = scan->data;
    scan->end = to - marker;
    scan->cut_off = !marker;
    memset(to - marker, 0, PAD);
}

/* After jpeg_start_decompress: takes over if this is a scan for us. To be freed; NULL leaves it to libjpeg. */
static struct scan *take_over(j_decompress_ptr jpeg) {
    int baseline = !jpeg->progressive_mode && !jpeg->arith_code && jpeg->Ss == 0 && jpeg->Se == 63;
    if (!KNOWN || !baseline || jpeg_has_multiple_scans(jpeg) || jpeg->restart_interval) return NULL;
    struct scan *scan = malloc(sizeof *scan + jpeg->src->bytes_in_buffer + PAD);
    if (!scan) return NULL;
    memset(scan, 0, offsetof(struct scan, data));
    for (int c = 0; c < jpeg->comps_in_scan; c++) {
        int dc = jpeg->cur_comp_info[c]->dc_tbl_no, ac = jpeg->cur_comp_info[c]->ac_tbl_no;
        if (dc > 1 || ac > 1 || !make_codes(&scan->dc[dc], jpeg->dc_huff_tbl_ptrs[dc], 1) ||
            !make_codes(&scan->ac[ac], jpeg->ac_huff_tbl_ptrs[ac], 0)) {
            free(scan);
            return NULL;
        }
    }
    make_twos(scan->two[0], scan->ac[0].look);
    make_twos(scan->two[1], scan->ac[1].look);
    unstuff(scan, jpeg->src->next_input_byte, jpeg->src->next_input_byte + jpeg->src->bytes_in_buffer);
    ((struct entropy_head *)jpeg->entropy)->decode_mcu = decode_mcu;
    return scan;
}
