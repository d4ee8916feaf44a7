/* Events and waits. */
#include "suite.h"

static void CALLBACK add(DWORD_PTR context)
{
    note(0, (DWORD)context, NULL, 0);
}

ROW(events_stay_set_until_they_are_reset, "W49 W7")
{
    WSAEVENT event = WSACreateEvent();

    MUST(event != WSA_INVALID_EVENT);
    CHECK(!signalled(event, 0));
    EQUAL(WSASetEvent(event), TRUE);
    CHECK(signalled(event, 0));
    CHECK(signalled(event, 0));
    EQUAL(WSASetEvent(event), TRUE);
    EQUAL(WSAResetEvent(event), TRUE);
    CHECK(!signalled(event, 0));
    EQUAL(WSACloseEvent(event), TRUE);
}

ROW(events_that_are_none, "W49")
{
    WSAEVENT closed = WSACreateEvent();
    WSAEVENT none[] = {NULL, closed, (WSAEVENT)(ULONG_PTR)0x1234, (WSAEVENT)(ULONG_PTR)-1};

    WSACloseEvent(closed);
    for (int i = 0; i < 4; i++) {
        WSASetLastError(0);
        EQUAL(WSASetEvent(none[i]), FALSE, "event %d", i);
        EQUAL(WSAGetLastError(), WSA_INVALID_HANDLE, "event %d", i);
        EQUAL(WSAResetEvent(none[i]), FALSE, "event %d", i);
        EQUAL(WSACloseEvent(none[i]), FALSE, "event %d", i);
        EQUAL(WSAWaitForMultipleEvents(1, &none[i], FALSE, 0, FALSE), WSA_WAIT_FAILED);
        EQUAL(WSAGetLastError(), WSA_INVALID_HANDLE, "event %d", i);
    }
}

ROW(the_first_that_is_set_is_told, "W49")
{
    WSAEVENT events[64];

    for (int i = 0; i < 64; i++)
        events[i] = WSACreateEvent();
    EQUAL(WSAWaitForMultipleEvents(64, events, FALSE, 5, FALSE), WSA_WAIT_TIMEOUT);
    WSASetEvent(events[63]);
    EQUAL(WSAWaitForMultipleEvents(64, events, FALSE, PATIENCE_MS, FALSE), WSA_WAIT_EVENT_0 + 63);
    WSASetEvent(events[17]);
    EQUAL(WSAWaitForMultipleEvents(64, events, FALSE, PATIENCE_MS, FALSE), WSA_WAIT_EVENT_0 + 17);
    EQUAL(WSAWaitForMultipleEvents(64, events, TRUE, 5, FALSE), WSA_WAIT_TIMEOUT);
    for (int i = 0; i < 64; i++)
        WSASetEvent(events[i]);
    EQUAL(WSAWaitForMultipleEvents(64, events, TRUE, PATIENCE_MS, FALSE), WSA_WAIT_EVENT_0);
    for (int i = 0; i < 64; i++)
        WSACloseEvent(events[i]);
}

ROW(how_many_there_may_be, "W49")
{
    WSAEVENT events[65];

    for (int i = 0; i < 65; i++)
        events[i] = WSACreateEvent();
    EQUAL(WSAWaitForMultipleEvents(65, events, FALSE, 0, FALSE), WSA_WAIT_FAILED);
    EQUAL(WSAGetLastError(), WSA_INVALID_PARAMETER);
    EQUAL(WSAWaitForMultipleEvents(0, events, FALSE, 0, FALSE), WSA_WAIT_FAILED);
    EQUAL(WSAGetLastError(), WSA_INVALID_PARAMETER);
    EQUAL(WSAWaitForMultipleEvents(2, unmapped(), FALSE, 0, FALSE), WSA_WAIT_FAILED);
    for (int i = 0; i < 65; i++)
        WSACloseEvent(events[i]);
}

static void set_later(void *argument)
{
    pause_ms(50);
    WSASetEvent(argument);
}

ROW(a_wait_that_another_thread_ends, "W49")
{
    WSAEVENT event = WSACreateEvent();
    struct thread *thread = start_thread(set_later, event);

    EQUAL(WSAWaitForMultipleEvents(1, &event, TRUE, WSA_INFINITE, FALSE), WSA_WAIT_EVENT_0);
    wait_for_thread(thread);
    WSACloseEvent(event);
}

static void queue_later(void *argument)
{
    int error;

    pause_ms(50);
    EQUAL(WPUQueueApc(argument, add, 1, &error), 0);
}

ROW(a_wait_that_a_routine_ends, "W49 W9")
{
    WSAEVENT event = WSACreateEvent();
    WSATHREADID mine = own_thread();
    struct thread *thread = start_thread(queue_later, &mine);

    forget();
    EQUAL(WSAWaitForMultipleEvents(1, &event, FALSE, PATIENCE_MS, TRUE), WSA_WAIT_IO_COMPLETION);
    EQUAL(completions(0), 1);
    /* The caller has to wait again. */
    EQUAL(WSAWaitForMultipleEvents(1, &event, FALSE, 5, TRUE), WSA_WAIT_TIMEOUT);
    WSASetEvent(event);
    EQUAL(WSAWaitForMultipleEvents(1, &event, FALSE, 5, TRUE), WSA_WAIT_EVENT_0);
    wait_for_thread(thread);
    WSACloseEvent(event);
}

ROW(sleeping, "W49")
{
    WSATHREADID mine = own_thread();
    struct thread *thread;
    unsigned long long begun = now_ms();
    int error;

    EQUAL(SleepEx(50, TRUE), 0);
    EQUAL(SleepEx(50, FALSE), 0);
    CHECK(now_ms() - begun >= 100);
    forget();
    EQUAL(WPUQueueApc(&mine, add, 1, &error), 0);
    EQUAL(SleepEx(PATIENCE_MS, TRUE), WAIT_IO_COMPLETION);
    EQUAL(completions(0), 1);
    thread = start_thread(queue_later, &mine);
    EQUAL(SleepEx(INFINITE, TRUE), WAIT_IO_COMPLETION);
    wait_for_thread(thread);
    EQUAL(completions(0), 2);
}
