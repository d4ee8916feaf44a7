/* WSAEFAULT: five pointers, each of them NULL with a size, unmapped, across the border of a page
 * that cannot be accessed, read-only, in the kernel's half, and in the null page; by both entry
 * points. None of it crashes, starts anything or writes anything. */
#include "suite.h"

enum kind { NOT_THERE, UNMAPPED, STRADDLING, READ_ONLY, KERNEL, NULL_PAGE };
#define EACH_KIND(kind) (enum kind kind = NOT_THERE; kind <= NULL_PAGE; kind++)

static const char *const names[] = {"NULL",      "unmapped", "straddling",
                                    "read-only", "kernel",   "null page"};

/* A pointer of that kind to `needed` bytes. */
static void *bad(enum kind kind, const void *bytes, size_t needed)
{
    unsigned char *memory;

    switch (kind) {
    case NOT_THERE:
        return NULL;
    case UNMAPPED:
        return unmapped();
    case STRADDLING:
        memory = border() - needed / 2;
        memcpy(memory, bytes, needed / 2);
        return memory;
    case READ_ONLY:
        return read_only(bytes, needed);
    case KERNEL:
        return (void *)0xffff888000000000u;
    default:
        return (void *)16;
    }
}

static unsigned char record[MOST_RECORD], zeros[MOST_RECORD];
static SOCKET accepted, onwards;
static DWORD length;

/* Nothing is started by a call that fails (W5). */
static void nothing_comes(WSAEVENT event)
{
    CHECK(!signalled(event, 0));
    EQUAL(SleepEx(0, TRUE), 0);
}

ROW(the_input, "S31 S6 W5")
{
    WSAEVENT event = WSACreateEvent();

    accepted = redirected();
    onwards = overlapped_socket();
    length = record_of(accepted, record);
    for EACH_KIND(kind) {
        void *in = bad(kind, record, length);
        int expected = kind == READ_ONLY ? 0 : WSAEFAULT;
        for EACH_ENTRY(entry) {
            WSAOVERLAPPED overlapped = fresh(event);
            DWORD returned;
            struct call call = set_call(onwards, in, length, &returned);
            EQUAL(error_of(entry, call), expected, "%s", names[kind]);
            EQUAL(returned, 0, "%s", names[kind]);
            if (kind == READ_ONLY)
                continue;
            call = set_call(onwards, in, length, &returned);
            call.overlapped = &overlapped;
            EQUAL(error_of(entry, call), WSAEFAULT, "%s, overlapped", names[kind]);
            EQUAL(returned, UNTOUCHED, "%s, overlapped", names[kind]);
            CHECK(is_fresh(&overlapped), "%s", names[kind]);
        }
    }
    nothing_comes(event);
    WSACloseEvent(event);
}

ROW(the_output, "S31 W5")
{
    static const DWORD codes[] = {QUERY_RECORDS, QUERY_CONTEXT};
    WSAEVENT event = WSACreateEvent();

    for EACH_KIND(kind) {
        for (int i = 0; i < 2; i++) {
            void *out = bad(kind, zeros, sizeof zeros);
            for EACH_ENTRY(entry) {
                WSAOVERLAPPED overlapped = fresh(event);
                DWORD returned;
                struct call call = query_call(accepted, codes[i], out, sizeof zeros, &returned);
                EQUAL(error_of(entry, call), WSAEFAULT, "%s, code %x", names[kind], codes[i]);
                EQUAL(returned, 0, "%s, code %x", names[kind], codes[i]);
                call = query_call(accepted, codes[i], out, sizeof zeros, &returned);
                call.overlapped = &overlapped;
                EQUAL(error_of(entry, call), WSAEFAULT, "%s, overlapped", names[kind]);
                EQUAL(returned, UNTOUCHED, "%s, overlapped", names[kind]);
                CHECK(is_fresh(&overlapped), "%s", names[kind]);
            }
            if (kind == STRADDLING)
                CHECK(memcmp(out, zeros, sizeof zeros / 2) == 0, "nothing is written");
        }
    }
    nothing_comes(event);
    WSACloseEvent(event);
}

ROW(the_output_of_a_set, "S31 S9 W5")
{
    for EACH_KIND(kind) {
        void *out = bad(kind, zeros, 64);
        for EACH_ENTRY(entry) {
            WSAOVERLAPPED overlapped = fresh(NULL);
            DWORD returned;
            struct call call = set_call(onwards, record, length, &returned);
            call.out = out;
            call.out_size = 64;
            EQUAL(error_of(entry, call), WSAEFAULT, "%s", names[kind]);
            EQUAL(returned, 0, "%s", names[kind]);
            call.overlapped = &overlapped;
            EQUAL(error_of(entry, call), WSAEFAULT, "%s, overlapped", names[kind]);
            CHECK(is_fresh(&overlapped), "%s", names[kind]);
        }
    }
}

ROW(the_returned_length, "S31 W5 W13 W14")
{
    static const DWORD codes[] = {SET_RECORDS, QUERY_RECORDS, QUERY_CONTEXT, 0xdeadbeefu};
    WSAEVENT event = WSACreateEvent();
    unsigned char out[MOST_RECORD];

    for EACH_KIND(kind) {
        for (int i = 0; i < 4; i++) {
            void *returned = bad(kind, zeros, sizeof(DWORD));
            for EACH_ENTRY(entry) {
                WSAOVERLAPPED overlapped = fresh(event);
                struct call call = {onwards, codes[i], record, length, NULL,
                                    0,       returned, NULL,   NULL};
                if (codes[i] != SET_RECORDS) {
                    call.s = accepted;
                    call.out = out;
                    call.out_size = sizeof out;
                }
                EQUAL(error_of(entry, call), WSAEFAULT, "%s, code %x", names[kind], codes[i]);
                call.overlapped = &overlapped;
                EQUAL(error_of(entry, call), WSAEFAULT, "%s, overlapped", names[kind]);
                CHECK(is_fresh(&overlapped), "%s", names[kind]);
            }
        }
    }
    nothing_comes(event);
    WSACloseEvent(event);
}

ROW(the_overlapped_structure, "S31 S18 W5")
{
    static const DWORD codes[] = {SET_RECORDS, QUERY_RECORDS, 0xdeadbeefu};
    WSAOVERLAPPED content = fresh(NULL);
    unsigned char out[MOST_RECORD];

    for EACH_KIND(kind) {
        for (int i = 0; i < 3; i++) {
            WSAOVERLAPPED *overlapped = bad(kind, &content, sizeof content);
            for EACH_ENTRY(entry) {
                DWORD returned;
                struct call call = set_call(onwards, record, length, &returned);
                if (codes[i] != SET_RECORDS)
                    call = query_call(accepted, codes[i], out, sizeof out, &returned);
                call.overlapped = overlapped;
                if (kind == NOT_THERE) {
                    int expected = codes[i] == 0xdeadbeefu ? WSAEOPNOTSUPP : 0;
                    EQUAL(error_of(entry, call), expected, "no OVERLAPPED: a synchronous call");
                    continue;
                }
                EQUAL(error_of(entry, call), WSAEFAULT, "%s, code %x", names[kind], codes[i]);
                EQUAL(returned, UNTOUCHED, "%s, code %x", names[kind], codes[i]);
                call.routine = note;
                EQUAL(error_of(entry, call), WSAEFAULT, "%s, with a routine", names[kind]);
            }
        }
    }
    EQUAL(SleepEx(0, TRUE), 0);
}

ROW(the_routine, "S31 W5")
{
    static const enum kind kinds[] = {UNMAPPED, KERNEL, NULL_PAGE};
    WSAEVENT event = WSACreateEvent();
    unsigned char out[MOST_RECORD];

    for (int i = 0; i < 3; i++) {
        void *address = bad(kinds[i], zeros, 16);
        LPWSAOVERLAPPED_COMPLETION_ROUTINE routine;
        memcpy(&routine, &address, sizeof routine);
        for EACH_ENTRY(entry) {
            WSAOVERLAPPED overlapped = fresh(event);
            DWORD returned;
            struct call call = set_call(onwards, record, length, &returned);
            call.overlapped = &overlapped;
            call.routine = routine;
            EQUAL(error_of(entry, call), WSAEFAULT, "%s, SET", names[kinds[i]]);
            CHECK(is_fresh(&overlapped), "%s", names[kinds[i]]);
            call = query_call(accepted, QUERY_RECORDS, out, sizeof out, &returned);
            call.overlapped = &overlapped;
            call.routine = routine;
            EQUAL(error_of(entry, call), WSAEFAULT, "%s, QUERY", names[kinds[i]]);
            CHECK(is_fresh(&overlapped), "%s", names[kinds[i]]);
        }
    }
    nothing_comes(event);
    WSACloseEvent(event);
}

ROW(what_a_plain_socket_ignores, "S16 S22 W2")
{
    SOCKET plain = plain_socket();
    void *address = unmapped();
    LPWSAOVERLAPPED_COMPLETION_ROUTINE routine;

    memcpy(&routine, &address, sizeof routine);
    for EACH_ENTRY(entry) {
        DWORD returned;
        struct call call = set_call(plain, record, length, &returned);
        call.overlapped = unmapped();
        call.routine = routine;
        EQUAL(error_of(entry, call), 0);
        EQUAL(returned, 0);
    }
    EQUAL(SleepEx(0, TRUE), 0);
    closesocket(plain);
}

ROW(the_pointers_of_a_provider, "S31 S23 S25")
{
    WSATHREADID content = {NULL, 0};
    unsigned char out[MOST_RECORD];
    int ignored;

    MUST(WPUOpenCurrentThread(&content, &ignored) == 0);
    for EACH_KIND(kind) {
        WSAOVERLAPPED overlapped = fresh(NULL);
        DWORD returned = UNTOUCHED;
        int error = 0;
        WSATHREADID *thread = bad(kind, &content, sizeof content);
        int *place = bad(kind, zeros, sizeof error);
        /* With the place for the error there is none to tell it in; the result still does. */
        EQUAL(WSPIoctl(INVALID_SOCKET, SET_RECORDS, record, length, NULL, 0, &returned, NULL, NULL,
                       &content, place),
              SOCKET_ERROR, "%s", names[kind]);
        if (kind == NOT_THERE || kind == READ_ONLY)
            continue;
        EQUAL(WSPIoctl(accepted, QUERY_RECORDS, NULL, 0, out, sizeof out, &returned, &overlapped,
                       note, thread, &error),
              SOCKET_ERROR, "%s", names[kind]);
        EQUAL(error, WSAEFAULT, "%s", names[kind]);
        CHECK(is_fresh(&overlapped), "%s", names[kind]);
    }
    EQUAL(SleepEx(0, TRUE), 0);
    WPUCloseThread(&content, &ignored);
    closesocket(onwards);
    closesocket(accepted);
    lab("close");
}
