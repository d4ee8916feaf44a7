/* Who may: root and anybody else in the service's cgroup, and nobody out of it. The rows stand in
 * the order in which the process gives up what it has. */
#include "suite.h"

static unsigned char record[MOST_RECORD];
static DWORD length;
static SOCKET accepted, prepared;

ROW(root_in_the_services_cgroup_may, "S30")
{
    DWORD returned;

    accepted = redirected();
    prepared = overlapped_socket();
    length = record_of(accepted, record);
    for EACH_ENTRY(entry)
        EQUAL(error_of(entry, set_call(prepared, record, length, &returned)), 0);
}

ROW(an_ordinary_user_in_it_may, "S30 Q6")
{
    unsigned char same[MOST_RECORD];
    DWORD returned;

    become_nobody();
    for EACH_ENTRY(entry) {
        EQUAL(error_of(entry, set_call(prepared, record, length, &returned)), 0);
        EQUAL(error_of(entry, query_call(accepted, QUERY_RECORDS, same, sizeof same, &returned)),
              0);
        EQUAL(returned, length);
    }
}

ROW(out_of_it_an_ordinary_user_may_ask_but_not_set, "S30 Q6")
{
    unsigned char same[MOST_RECORD];
    DWORD returned;
    int before = atoi(lab("count AccessDenied"));

    lab("leave");
    for EACH_ENTRY(entry) {
        EQUAL(error_of(entry, set_call(prepared, record, length, &returned)), WSAEACCES);
        EQUAL(returned, 0);
        EQUAL(error_of(entry, query_call(accepted, QUERY_RECORDS, same, sizeof same, &returned)),
              0);
        EQUAL(returned, length);
    }
    EQUAL(atoi(lab("count AccessDenied")), before + 2);
}
