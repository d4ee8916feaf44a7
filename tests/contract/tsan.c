/* Part of the programs under ThreadSanitizer: newer compilers than gcc, such as rustc, call these,
 * which the runtime of an older gcc does not have. It does watch the functions that they call. */
#include <string.h>

void *__tsan_memcpy(void *to, const void *from, size_t length)
{
    return memcpy(to, from, length);
}

void *__tsan_memmove(void *to, const void *from, size_t length)
{
    return memmove(to, from, length);
}

void *__tsan_memset(void *to, int value, size_t length)
{
    return memset(to, value, length);
}
