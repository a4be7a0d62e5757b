/* A plugin of QEMU's emulator that counts what the guest executes between two calls in one of its programs
 * (bench/hitter.c). QEMU's packages ship no header for plugins: what is needed of the interface is declared here.
 *
 * Arguments, all needed: out=FILE, to which each stretch adds a line, and four addresses of the program, low=, high=
 * (of its code), start=, stop=. It is linked to where no other program of the guest has code, so an address
 * tells whose instruction it is; the upper half of all addresses is the kernel's.
 *
 * A line: instructions of the program, of everything else in user mode, of the kernel; and repetitions. A string
 * instruction with a prefix (rep movsq) is emulated as a loop over itself. It counts as one instruction, as a processor
 * counts it, and how often it went round counts apart, as repetitions.
 *
 * For one processor in one thread (-accel tcg,thread=single -smp 1): nothing here is locked. */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_info;
typedef void translated_fn(uint64_t id, struct qemu_plugin_tb *tb);
typedef void executed_fn(unsigned int cpu, void *argument);

/* What the last parameter but one of register_vcpu_tb_exec_cb may be: the function looks at no register. */
enum { NO_REGISTERS = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, translated_fn *translated);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *tb, executed_fn *executed, int registers, void *argument);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);

#define EXPORTED __attribute__((visibility("default")))

EXPORTED int qemu_plugin_version = PLUGIN_VERSION;

enum owner { PROGRAM, OTHERS, KERNEL, OWNERS };

/* A run of instructions as the emulator translated it. Made once for each translation and kept for good. */
struct block {
    uint32_t length;
    enum owner owner;
};

static uint64_t low, high, start, stop;
static FILE *out;
static int counting;
static uint64_t counts[OWNERS], repetitions;
static const struct block *last;

static void executed(unsigned int cpu, void *argument)
{
    const struct block *block = argument;

    (void)cpu;
    if (!counting)
        return;
    /* One instruction that leads to itself is a repeated string instruction. */
    if (block == last && block->length == 1)
        repetitions++;
    else
        counts[block->owner] += block->length;
    last = block;
}

static void started(unsigned int cpu, void *argument)
{
    (void)cpu;
    (void)argument;
    memset(counts, 0, sizeof counts);
    repetitions = 0;
    counting = 1;
}

static void stopped(unsigned int cpu, void *argument)
{
    (void)cpu;
    (void)argument;
    counting = 0;
    fprintf(out, "%" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", counts[PROGRAM], counts[OTHERS], counts[KERNEL],
            repetitions);
    fflush(out);
}

static void translated(uint64_t id, struct qemu_plugin_tb *tb)
{
    uint64_t address = qemu_plugin_tb_vaddr(tb);
    struct block *block = malloc(sizeof *block);

    (void)id;
    if (!block)
        abort();
    block->length = (uint32_t)qemu_plugin_tb_n_insns(tb);
    block->owner = address >> 63 ? KERNEL : address >= low && address < high ? PROGRAM : OTHERS;
    if (address == start)
        qemu_plugin_register_vcpu_tb_exec_cb(tb, started, NO_REGISTERS, NULL);
    if (address == stop)
        qemu_plugin_register_vcpu_tb_exec_cb(tb, stopped, NO_REGISTERS, NULL);
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, NO_REGISTERS, block);
}

static int address_of(const char *argument, const char *name, uint64_t *address)
{
    size_t length = strlen(name);

    if (strncmp(argument, name, length) || argument[length] != '=')
        return 0;
    *address = strtoull(argument + length + 1, NULL, 0);
    return 1;
}

EXPORTED int qemu_plugin_install(uint64_t id, const struct qemu_info *info, int argc, char **argv)
{
    (void)info;
    for (int i = 0; i < argc; i++) {
        if (address_of(argv[i], "low", &low) || address_of(argv[i], "high", &high)
            || address_of(argv[i], "start", &start) || address_of(argv[i], "stop", &stop))
            continue;
        if (strncmp(argv[i], "out=", 4) || !(out = fopen(argv[i] + 4, "a"))) {
            fprintf(stderr, "count: cannot use the argument %s\n", argv[i]);
            return -1;
        }
    }
    if (!out || !low || !high || !start || !stop) {
        fprintf(stderr, "count: out, low, high, start and stop are needed\n");
        return -1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    return 0;
}
