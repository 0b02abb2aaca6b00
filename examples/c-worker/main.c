/* A static binary: no interpreter, no library of the stack. Build it with: make -C examples/c-worker */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int main(void)
{
    printf("static binary, uid %d, DYNO=%s\n", (int)getuid(), getenv("DYNO"));
    return 0;
}
