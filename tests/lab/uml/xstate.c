/* Preloaded into User Mode Linux on a processor with more state than it has room for.
 *
 * NOTE: before 6.13 UML keeps 2696 bytes of extended processor state for each process, and the
 * host's PTRACE_SETREGSET takes no less than all of it: EFAULT on a processor with AMX (11008
 * bytes), and the Linux panics. Here the rest is added, as the state of a unit never used.
 *
 * No header is included, so that a compiler without the C library's own files will do.
 */
#define PTRACE_GETREGSET 0x4204
#define PTRACE_SETREGSET 0x4205
#define NT_X86_XSTATE 0x202
#define XSTATE_BV 512 /* offset of the bitmap of the units in use: Intel SDM volume 1, 13.4.2 */
#define AMX (3UL << 17)
#define RTLD_NEXT ((void *)-1L)

struct iovec {
	void *base;
	unsigned long length;
};

extern void *dlsym(void *handle, const char *name);
extern void *memcpy(void *to, const void *from, unsigned long length);

static long (*real)(long, long, void *, void *);
static unsigned char state[65536];
static unsigned long whole;

long ptrace(long request, long pid, void *address, void *data)
{
	struct iovec *given = data;
	struct iovec full = { state, sizeof(state) };

	if (!real)
		*(void **)&real = dlsym(RTLD_NEXT, "ptrace");
	if (request != PTRACE_SETREGSET || address != (void *)NT_X86_XSTATE)
		return real(request, pid, address, data);
	if (!whole) {
		if (real(PTRACE_GETREGSET, pid, address, &full) < 0)
			return -1;
		whole = full.length;
		for (unsigned long i = 0; i < whole; i++)
			state[i] = 0;
	}
	if (given->length >= whole)
		return real(request, pid, address, data);
	memcpy(state, given->base, given->length);
	*(unsigned long *)(state + XSTATE_BV) &= ~AMX;
	full.length = whole;
	return real(request, pid, address, &full);
}
